"""An app of a few lines inside this service's middlewares, called without BentoML or a socket."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import EmbedderError
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.server.bento_app import RaisingErrors
from embedder.settings import Settings

MAX_BODY_BYTES, MAX_HELD_BYTES, MAX_READ_S = 10, 15, 0.05
LIMITS = {  # far below what `Settings` itself accepts
    "max_body_bytes": MAX_BODY_BYTES,
    "max_held_bytes": MAX_HELD_BYTES,
    "max_items_per_request": 1,
    "request_timeout_s": MAX_READ_S,
}


def guard(app: ASGIApp, *, api_key: str | None = None, drain: Drain | None = None) -> RequestGuard:
    return RequestGuard(
        RaisingErrors(app),
        Settings().model_copy(update=LIMITS),
        keys=ApiKeys(Settings(api_key=api_key)),
        drain=drain or Drain(),
        open_paths=frozenset({"/page"}),
        upload_paths=frozenset({"/img/embed"}),
    )


def whole(app: ASGIApp, *, api_key: str | None = None, drain: Drain | None = None) -> RequestBoundary:
    drain = drain or Drain()
    return RequestBoundary(guard(app, api_key=api_key, drain=drain), drain=drain, is_logged=False)


def call(
    app: ASGIApp,
    received: Iterable[Message] = (),
    *,
    api_key: str | None = None,
    drain: Drain | None = None,
    **request: Any,
) -> list[Message]:
    """As `call_app`, to the app inside the middlewares."""
    return call_app(whole(app, api_key=api_key, drain=drain), received, **request)


def call_app(
    app: ASGIApp,
    received: Iterable[Message] = (),
    *,
    path: str = "/embed",
    method: str = "POST",
    headers: Iterable[tuple[bytes, bytes]] = (),
    kind: str = "http",
) -> list[Message]:
    """Send the messages, then disconnect. Returns the messages that the client gets."""
    sent: list[Message] = []
    messages = iter(received)

    async def receive() -> Message:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))
    return sent


def chunks(*parts: bytes) -> list[Message]:
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": index < last} for index, part in enumerate(parts)]


async def longest_turn_s(work: Awaitable[object]) -> float:
    """The longest time for which `work` keeps the event loop from another task, in CPU seconds of the loop's thread."""
    turns: list[float] = []

    async def take_turns() -> None:
        while True:
            turns.append(time.thread_time())
            await asyncio.sleep(0)

    other = asyncio.create_task(take_turns())
    await asyncio.sleep(0)
    await work
    await asyncio.sleep(0)
    other.cancel()
    return max(later - earlier for earlier, later in itertools.pairwise(turns))


class Echo:
    """Returns 200 and the body that it received; `calls` counts the requests."""

    def __init__(self) -> None:
        self.calls = 0
        self.after: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.after.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body})


def answering(status: int, *parts: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        for message in chunks(*parts):
            await send({**message, "type": "http.response.body"})

    return app


def status_and_error(sent: list[Message]) -> tuple[int, dict[str, Any]]:
    """Status and error of a response, which must be complete and have the headers of JSON."""
    start, body, *end = sent
    assert end == [{"type": "http.response.body"}] * body.get("more_body", False)  # once the body's rest was dropped
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    assert len(headers) == len(start["headers"])
    fields = json.loads(body["body"])
    assert list(fields) in (["error"], ["error", "detail", "message"])
    return start["status"], fields["error"]


def raising(error: EmbedderError) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return app
