"""Vertex AI's contract for custom containers: its body, and its names of the routes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from embedder.errors import InvalidRequest, RequestTooLarge, UnsupportedDimensions
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.dialects.vertex import PATH, parse_predict
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.http.playground_routes import OPEN_PATHS
from embedder.http.routes import Routes
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from tests.http.asgi import call_app

ROUTE = "/v1/endpoints/17/deployedModels/4:predict"  # as Vertex AI calls it by default
HEALTH = "/v1/endpoints/17/deployedModels/4"


def parse(instances: list[Any], **parameters: Any) -> Any:
    return parse_predict({"instances": instances, "parameters": parameters}, Settings(max_items_per_request=3))


def test_parameters_are_the_options_of_instances_without_their_own() -> None:
    own = {"text": "green", "dimensions": 128.0, "normalize": True}
    first, second = parse(["red", own], dimensions=64.0, instruction="Find it.", normalize=False).items
    assert (first.dimensions, first.instruction, first.normalize) == (64, "Find it.", False)
    assert (second.dimensions, second.instruction, second.normalize) == (128, "Find it.", True)
    assert type(first.dimensions) is type(second.dimensions) is int, "numbers come from gRPC as floats"


def test_data_uri_is_an_image() -> None:
    (item,) = parse(["data:image/png;base64,AAAA"]).items
    assert type(item.parts[0]).__name__ == "Image"


@pytest.mark.parametrize(
    ("instances", "parameters", "error", "reason"),
    [
        (["red"] * 4, {}, RequestTooLarge, "got 4 items; allowed: 1 to 3"),
        ([{"txt": "red"}], {}, InvalidRequest, "unknown field: txt (did you mean text?)"),
        (["red"], {"dimensions": 64.5}, UnsupportedDimensions, "got 64.5"),
        (["red"], {"output_dtype": "int8", "normalize": False}, InvalidRequest, "normalize"),
        (["red", ""], {}, InvalidRequest, "item 1: text is empty"),
    ],
)
def test_what_cannot_be_embedded_is_refused_with_the_reason(
    instances: list[Any], parameters: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error) as raised:
        parse(instances, **parameters)
    assert reason in str(raised.value)


@contextlib.contextmanager
def routes() -> Iterator[Routes]:
    with contextlib.closing(Routes(Settings(), Metrics(()), version="1", needs_key=True)) as routes:
        yield routes


def test_routes_that_vertex_ai_names_lead_to_the_services_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also past the keys: a probe has none."""
    monkeypatch.setenv("AIP_PREDICT_ROUTE", ROUTE)
    monkeypatch.setenv("AIP_HEALTH_ROUTE", HEALTH)
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    with routes() as one:
        names, paths = one.other_names, {route.path for route in one._router.routes}  # type: ignore[attr-defined]
    assert names == {ROUTE: PATH, HEALTH: "/health"}
    assert set(names.values()) <= paths
    drain, settings = Drain(), Settings(api_key="s3cret")
    guard = RequestGuard(app, settings, keys=ApiKeys(settings), drain=drain, open_paths=OPEN_PATHS)
    whole = RequestBoundary(guard, drain=drain, is_logged=False, other_names=names)
    assert call_app(whole, path=f"{HEALTH}/", method="GET")[0]["status"] == 200
    assert call_app(whole, path=ROUTE)[0]["status"] == 401
    assert seen == ["/health"]


def test_route_of_the_service_keeps_its_own_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rawPredict` passes any body on, for example to the route of OpenAI's clients."""
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/embeddings")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "")
    with routes() as one:
        assert one.other_names == {}
        document = orjson.loads(one._document)
    assert PATH in document["paths"]
