"""`priority` in the body of every route that embeds or scores, whatever it embeds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.engine.engine import Engine
from embedder.errors import InvalidRequest
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.rerank import RERANKING
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.http.request_body import RequestBody
from embedder.http.routes import DIALECTS, UPLOAD_PATHS, Routes, Serving
from embedder.inputs.decoder import Decoder
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.preprocess import ModelInput
from embedder.playground.collection import Collection
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from tests.conftest import encoded, picture
from tests.fake_model import FakeModel, item

HIDDEN_SIZE = 64  # the size that the examples ask for
BODIES = [
    pytest.param(dialect.path.replace("{model}", "any"), body, id=f"{dialect.path}: {name}")
    for dialect in (*DIALECTS, *RERANKING)
    for name, body in dialect.examples.items()
]
PNG = encoded(picture(32, 32), "PNG")


@dataclass
class AnyItem(FakeModel):
    """Embeds every item alike, one in each batch."""

    def preprocess(self, item: EmbeddingItem, decoder: Decoder | None = None) -> ModelInput:
        return super().preprocess(EmbeddingItem((Text("x" * 50),)), decoder)

    def run(self, inputs: list[ModelInput]) -> NDArray[np.float32]:
        super().run(inputs)
        return np.ones((len(inputs), HIDDEN_SIZE), np.float32)


class App:
    """The routes over an engine that the test can stop."""

    def __init__(self, model: FakeModel, settings: Settings) -> None:
        self.model = model
        self.engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, settings)
        self.routes = Routes(settings, Metrics(()), version="1", needs_key=False)
        served = ServedModel("the model", 64)
        collection = Collection(Settings(), is_bundled_model=False)
        preprocessor: Any = None
        self.routes.serving = Serving(
            self.engine, preprocessor, served, {}, collection, 0.0, lambda: True, reranker=served
        )
        drain = Drain()
        guard = RequestGuard(self.routes, settings, keys=ApiKeys(settings), drain=drain, upload_paths=UPLOAD_PATHS)
        self.app = RequestBoundary(guard, drain=drain, is_logged=False)

    def close(self) -> None:
        self.model.gate.set()
        self.engine.close()
        self.routes.close()

    def order(self, path: str, requests: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Send requests to a path, one after the other, while the device is busy; their names in the order in which
        they are answered. Each is given as what httpx's `post` takes, or as the body of a batch's line.
        """
        answered: list[str] = []

        async def send() -> None:
            transport = httpx.ASGITransport(self.app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:

                async def post(name: str, options: Mapping[str, Any]) -> None:
                    if "line" in options:
                        await self.routes._respond_to_line(path, options["line"])
                    else:
                        response = await client.post(path, **options)
                        assert response.status_code == 200, response.text
                    answered.append(name)

                tasks = []
                for name, options in requests.items():
                    before = len(self.engine._inputs)
                    tasks.append(asyncio.create_task(post(name, options)))
                    while not self.engine.pending_tokens or len(self.engine._inputs) == before:
                        assert not tasks[-1].done(), tasks[-1].exception()
                        await asyncio.sleep(0.001)
                    await self._all_wait()
                self.model.gate.set()
                await asyncio.gather(*tasks)

        self.model.gate.clear()
        self.model.is_entered.clear()
        holder = self.engine.submit(item("holder"))
        assert self.model.is_entered.wait(10)
        asyncio.run(send())
        holder.result(10)
        return answered

    async def _all_wait(self) -> None:
        """Wait until all items of the requests so far wait for the device."""
        num_waiting = -1
        while num_waiting != (num_waiting := len(self.engine._inputs)):
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    model = AnyItem()
    app = App(model, Settings(reranker="any", max_batch_tokens=64, max_input_tokens=64))
    yield app
    app.close()


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_request_with_a_priority_lets_a_later_one_go_first(path: str, body: dict[str, Any], app: App) -> None:
    requests = {"late": {**body, "priority": 3}, "earlier": {**body, "priority": 1}, "first": body}
    assert app.order(path, {name: {"json": one} for name, one in requests.items()}) == ["first", "earlier", "late"]


@pytest.mark.parametrize("priority", [None, 0, -1, -(2**63)])
def test_no_number_is_earlier_than_the_default(priority: Any, app: App) -> None:
    requests = {"first": {"input": "red"}, "second": {"input": "red", "priority": priority}}
    assert app.order("/v1/embeddings", {name: {"json": one} for name, one in requests.items()}) == ["first", "second"]


@pytest.mark.parametrize(
    "late",
    [
        pytest.param({"files": {"image": PNG}, "data": {"priority": "5"}}, id="form"),
        pytest.param({"files": {"image": PNG}, "params": {"priority": 5}}, id="form, in the URL"),
        pytest.param(
            {"content": PNG, "headers": {"content-type": "image/png"}, "params": {"priority": 5}}, id="body, in the URL"
        ),
        pytest.param({"json": {"input": "eA=="}, "params": {"priority": 5}}, id="JSON, in the URL"),
    ],
)
def test_files_have_a_priority_too(late: dict[str, Any], app: App) -> None:
    requests = {"late": late, "first": {"files": {"image": PNG}}}
    assert app.order("/img/embed", requests) == ["first", "late"]


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("priority", ["1", 1.5, True, [1]])
def test_priority_that_is_no_whole_number_is_refused(path: str, body: dict[str, Any], priority: Any, app: App) -> None:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(path, json={**body, "priority": priority})

    response = asyncio.run(post())
    assert response.status_code in (400, 422), response.text
    assert "priority: got" in response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/embeddings", {"input": ["red"] * 3}), ("/v1/rerank", {"query": "a", "documents": ["b", "c"]})],
)
def test_requests_go_before_the_lines_of_batches(path: str, body: dict[str, Any], app: App) -> None:
    requests = {"line": {"line": body}, "late": {"json": {**body, "priority": 10}}, "first": {"json": body}}
    assert app.order(path, requests) == ["first", "late", "line"]


def test_line_of_a_batch_is_read_in_a_thread(app: App) -> None:
    is_reading, loop_has_run = threading.Event(), threading.Event()

    def parse(fields: Any, _: Settings) -> NoReturn:
        is_reading.set()
        raise InvalidRequest("read" if loop_has_run.wait(10) else "the event loop waited")

    async def respond() -> None:
        reading = asyncio.create_task(app.routes._respond_to_line("/line", {}))
        while not is_reading.is_set():
            await asyncio.sleep(0.001)
        loop_has_run.set()
        await reading

    app.routes._dialects["/line"] = [Dialect("/line", "", RequestBody, RequestBody, parse, lambda *_: b"", {})]
    with pytest.raises(InvalidRequest, match=r"^read$"):
        asyncio.run(respond())
