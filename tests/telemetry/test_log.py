"""Log lines name their request and contain none of its content."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from starlette.types import Message, Receive, Scope, Send

from embedder.engine.aio import embed_each
from embedder.engine.device import WaitForRows
from embedder.engine.engine import Engine
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.preprocess import ModelInput
from embedder.server.bento_log import configure_logging
from embedder.settings import Settings
from embedder.telemetry.log import begin_request, count_items, request_id

SECRET = "what the caller sent"


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What a service of the given format would print. The handler is as BentoML's, the format as its end."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(lambda record: setattr(record, "trace_msg", "") is None)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s%(trace_msg)s"))
    ours, theirs = logging.getLogger("embedder"), logging.getLogger("bentoml")
    root = logging.getLogger()
    before = ours.handlers, ours.propagate, ours.level, theirs.handlers, theirs.propagate, root.handlers
    theirs.handlers = [handler]
    configure_logging(request.param)
    yield stream
    ours.handlers, ours.propagate, ours.level, theirs.handlers, theirs.propagate, root.handlers = before
    logging.captureWarnings(False)


class Fails:
    """A model whose forward pass, or preprocessing, breaks with the item's text in the reason."""

    def __init__(self, where: str) -> None:
        self.where = where

    def preprocess(self, item: EmbeddingItem) -> ModelInput:
        if self.where == "preprocess":
            raise RuntimeError("out of memory at 0x7f")
        return ModelInput(np.zeros(3, np.int64), np.zeros((3, 3), np.int64), np.empty(0, np.int64), (), 0, 0, 3)

    def launch(self, inputs: list[ModelInput]) -> WaitForRows:
        if self.where == "forward":
            raise RuntimeError("out of memory at 0x7f")
        return lambda: np.full((len(inputs), 8), np.inf, np.float32)


async def embed_one(engine: Engine, name: str) -> None:
    begin_request([(b"x-request-id", name.encode())])
    (outcome,) = await embed_each(engine, [EmbeddingItem((Text(SECRET),))], 30)
    assert "0x7f" not in str(outcome)


@pytest.mark.parametrize("lines", ["text"], indirect=True)
@pytest.mark.parametrize("where", ["preprocess", "forward", "finish"])
def test_failure_in_the_engines_threads_names_its_request(where: str, lines: io.StringIO) -> None:
    model = Fails(where)
    engine = Engine(model.preprocess, model.launch, 8, Settings())

    async def both() -> None:
        await asyncio.gather(embed_one(engine, "first"), embed_one(engine, "second"))

    asyncio.run(both())
    engine.close()
    named = [line for line in lines.getvalue().splitlines() if line.startswith("ERROR")]
    assert sorted(line.rpartition(" (request=")[2] for line in named) == ["first)", "second)"]
    assert SECRET not in lines.getvalue()


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_json_line_holds_message_request_and_traceback(lines: io.StringIO) -> None:
    def request() -> None:
        begin_request([(b"x-request-id", b"mine")])
        try:
            raise ValueError('a "quoted"\nreason')
        except ValueError:
            logging.getLogger("embedder.x").exception("it %s", "broke")

    contextvars.Context().run(request)
    logging.getLogger("bentoml.y").warning("theirs")
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert first.pop("time") <= second.pop("time")
    assert first.pop("exception").endswith('ValueError: a "quoted"\nreason')
    assert first == {"level": "error", "logger": "embedder.x", "message": "it broke", "request_id": "mine"}
    assert second == {"level": "warning", "logger": "bentoml.y", "message": "theirs"}


def ask(path: str, *, is_logged: bool = True, status: int | None = 200) -> None:
    """Send one request with an id through the middlewares to an app that embeds two items and says so."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        count_items(2, 44)
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": SECRET.encode()})

    async def receive() -> Message:
        return {"type": "http.request", "body": SECRET.encode(), "more_body": False}

    async def send(message: Message) -> None:
        pass

    drain = Drain()
    guard = RequestGuard(app, Settings(), keys=ApiKeys(Settings()), drain=drain)
    service = RequestBoundary(guard, drain=drain, is_logged=is_logged)
    headers = [(b"x-request-id", b"mine"), (b"authorization", SECRET.encode())]
    query = {"query_string": SECRET.encode()}
    asyncio.run(service({"type": "http", "method": "POST", "path": path, "headers": headers, **query}, receive, send))


@pytest.mark.parametrize("lines", ["text"], indirect=True)
@pytest.mark.parametrize(("status", "shown"), [(200, "200"), (400, "400"), (None, "499")])
def test_request_is_one_line_without_its_contents(status: int | None, shown: str, lines: io.StringIO) -> None:
    ask("/embed", status=status)
    (line,) = lines.getvalue().splitlines()
    head, _, tail = line.partition(" ms=")
    assert head == f"INFO embedder.access method=POST route=/embed status={shown} items=2 tokens=44"
    assert tail.endswith(" (request=mine)")
    assert SECRET not in line


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_json_line_of_a_request_has_the_same_fields(lines: io.StringIO) -> None:
    ask("/embed")
    fields = json.loads(lines.getvalue())
    assert 0 <= fields["ms"] < 10_000
    shown = {name: fields[name] for name in ("request_id", "method", "route", "status", "items", "tokens")}
    assert shown == {
        "request_id": "mine",
        "method": "POST",
        "route": "/embed",
        "status": 200,
        "items": 2,
        "tokens": 44,
    }


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_path_cannot_forge_a_line(lines: io.StringIO) -> None:
    ask("/\nERROR embedder \x1b[31m é" + "x" * 999)
    (line,) = lines.getvalue().splitlines()
    assert "route=/%0AERROR%20embedder%20%1B%5B31m%20%C3%A9xxx" in line
    assert len(line) < 250


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_no_line_is_written_for_probes_or_if_the_log_is_off(lines: io.StringIO) -> None:
    ask("/embed", is_logged=False)
    ask("/readyz")
    assert lines.getvalue() == ""


def test_outside_requests_there_is_no_id() -> None:
    nowhere = contextvars.Context()
    nowhere.run(count_items, 1, 2)
    assert nowhere.run(request_id) == ""
