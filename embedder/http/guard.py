"""The HTTP boundary, around BentoML's app: callers with a key and JSON within limits in, one shape of error out.

BentoML knows no keys, bounds no body, reads forms as well (a malformed one is an error 500), answers errors of its own
in three shapes, none of them ours, and its page at `/` loads a foreign script (BentoML 1.4.39).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import (
    NO_ANSWER,
    DeadlineExceeded,
    EmbedderError,
    InvalidKey,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
    UnsupportedContentType,
    without_traceback,
)
from embedder.http.api_keys import ApiKeys
from embedder.http.json_limits import exceeds_value_count
from embedder.http.openai import openai_error_body
from embedder.http.response import error_body, to_json
from embedder.server.lifecycle import Drain
from embedder.telemetry.log import begin_request

PROBES = frozenset({"/livez", "/healthz", "/readyz", "/health"})

WITH_BODY = ("POST", "PUT", "PATCH")
SMALL_BODY = 2**16  # bytes
DROPPED_S, DROPPED_BYTES = 1.0, 2**24
RETRY_AFTER_S = 1  # where bodies fill the memory: they last no longer than their requests

_CLOSE = (b"connection", b"close")
_REFUSALS: dict[type[EmbedderError], tuple[int, list[tuple[bytes, bytes]]]] = {  # before the body is read, or all of it
    InvalidKey: (401, [(b"www-authenticate", b"Bearer")]),
    RequestTooLarge: (413, [_CLOSE]),
    UnsupportedContentType: (415, [_CLOSE]),
    Overloaded: (429, [_CLOSE, (b"retry-after", str(RETRY_AFTER_S).encode())]),
    ShuttingDown: (503, [_CLOSE]),
    DeadlineExceeded: (504, [_CLOSE]),
}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_content_type",
    503: "not_ready",
}
_OF_A_PAGE = [  # that brings no such headers of its own
    (
        b"content-security-policy",
        b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


class RequestGuard:
    """ASGI middleware. Reads a request's body whole, counting as it comes, and gives error answers our shape.

    A body that takes longer than `max_read_s` would hold its connection, and a worker that drains, for ever. All bodies
    together are bounded from their first bytes to their answers: a picture takes about three times its body's memory.
    To read probes and `open_paths` no key is needed; probes are also answered while the worker drains, and not logged.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_held_bytes: int,
        max_values: int,
        max_read_s: float,
        *,
        keys: ApiKeys,
        drain: Drain,
        open_paths: frozenset[str],
        is_logged: bool,
        count_held_bytes: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_held_bytes = max_held_bytes
        self.held_bytes = 0
        self.max_values = max_values
        self.max_read_s = max_read_s
        self.keys = keys
        self.drain = drain
        self.open_paths = open_paths | PROBES
        self.is_logged = is_logged
        self.count_held_bytes = count_held_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": list(scope["headers"])}  # uvicorn puts trailers into its list
        path = scope["path"]
        log = begin_request(scope["headers"])
        answer = _Answer(send, log.id, self.drain, is_openai=path.startswith("/v1/"))
        try:
            with self.drain.request():
                await self._pass_on(scope, receive, answer)
        finally:
            if self.is_logged and path not in PROBES:
                log.write(scope["method"], path, answer.status)

    async def _pass_on(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        is_body_left = scope["method"] in WITH_BODY
        with self._holding() as hold:
            try:
                self._check(scope)
                if is_body_left:
                    _check_content_type(scope)
                    body = await _read(receive, self.max_body_bytes, self.max_read_s, hold)
                    is_body_left = False
                    await _check_values(body, self.max_values)
                    receive = _replay(body, receive)
            except tuple(_REFUSALS) as error:
                refusal = without_traceback(error)  # its frames hold the body
            except ClientDisconnect:  # while sending
                return
            else:
                await self.app(scope, receive, answer.send)
                return
        await answer.refuse(refusal, receive if is_body_left else None)

    @contextlib.contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """Around a request: counts its body's bytes as they come. Raises `Overloaded` where all are too many.

        A small body is let in all the same: a few large ones that come slowly shall not keep out every query.
        """
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            is_small = held + num_bytes <= SMALL_BODY
            if not is_small and self.held_bytes + num_bytes > self.max_held_bytes:
                text = f"bodies of {self.held_bytes} bytes wait; allowed: up to {self.max_held_bytes}"
                raise Overloaded(text, retry_after_s=RETRY_AFTER_S)
            held += num_bytes
            self.held_bytes += num_bytes
            self.count_held_bytes(num_bytes)

        try:
            yield hold
        finally:
            self.held_bytes -= held
            self.count_held_bytes(-held)

    def _check(self, scope: Scope) -> None:
        """Raises `ShuttingDown` and `InvalidKey`."""
        path = scope["path"]
        if self.drain.is_draining and path not in PROBES:
            raise ShuttingDown("the service is shutting down")
        is_open = path in self.open_paths and scope["method"] not in WITH_BODY
        if not is_open and not self.keys.open_for(scope["headers"]):
            raise InvalidKey("an API key is needed: send yours as `Authorization: Bearer <key>` or as `x-api-key`")


class _Answer:
    """Passes an answer on; one that is an error is held until it is whole, and mended where it is not ours."""

    def __init__(self, send: Send, request_id: str, drain: Drain, *, is_openai: bool) -> None:
        self.status: int | None = None
        self._send = send
        self._request_id = request_id.encode()
        self._drain = drain
        self._is_openai = is_openai
        self._start: Message = {}
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] < 400 or message["status"] == NO_ANSWER:
                await self._send_start(message["status"], message.get("headers", ()))
            else:
                self._start = message
        elif not self._start:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error()

    async def refuse(self, error: EmbedderError, rest: Receive | None) -> None:
        """The `rest` of the body is dropped before the connection is closed: many a client reads no answer before it
        has sent all.
        """
        status, headers = _REFUSALS[type(error)]
        self._start = {"type": "http.response.start", "status": status, "headers": headers}
        self._body = error_body(error)
        await self._send_error(rest)

    async def _send_error(self, rest: Receive | None = None) -> None:
        status, body = self._start["status"], self._body
        if not body.startswith(b'{"error":{'):
            body = _reshape(status, body)
        if self._is_openai:
            body = openai_error_body(json.loads(body)["error"])
        replaced = (b"content-length", b"content-type")
        headers = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() not in replaced]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send_start(status, headers)
        await self._send({"type": "http.response.body", "body": body, "more_body": rest is not None})
        if rest is not None:
            await _drop(rest)
            await self._send({"type": "http.response.body"})

    async def _send_start(self, status: int, given: Iterable[tuple[bytes, bytes]]) -> None:
        """The head of the answer: nothing of what serves it, the request's id, and how a page is to be treated."""
        self.status = status
        headers = [(name, value) for name, value in given if not _tells_the_server(name.lower())]
        headers.append((b"x-request-id", self._request_id))
        if self._drain.is_draining and _CLOSE not in headers:
            headers.append(_CLOSE)
        fields = {name.lower(): value for name, value in headers}
        if fields.get(b"content-type", b"").startswith(b"text/html") and b"content-security-policy" not in fields:
            headers += _OF_A_PAGE
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _tells_the_server(header: bytes) -> bool:
    return header == b"server" or header.startswith(b"x-bentoml-")


def _reshape(status: int, body: bytes) -> bytes:
    code = _CODES.get(status, "invalid_request" if status < 500 else "internal_error")
    kind = "invalid_request" if status < 500 else "server_error"
    return to_json({"error": {"code": code, "message": _message(status, body), "item": None, "type": kind}})


def _message(status: int, body: bytes) -> str:
    """What BentoML's body says: `{"error": .., "detail": [pydantic's errors]}`, `[{"error": ..}]`, or plain text.

    Of a server error nothing: what it says may be of the inside.
    """
    if status >= 500:
        return _phrase(status)
    try:
        fields: Any = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip() or _phrase(status)
    fields = fields[0] if isinstance(fields, list) and fields else fields
    if not isinstance(fields, dict):
        return _phrase(status)
    detail = fields.get("detail")
    if isinstance(detail, list):
        detail = "; ".join(": ".join((*map(str, fault["loc"]), fault["msg"])) for fault in detail)
    return str(detail or fields.get("error") or _phrase(status))


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else f"error {status}"


def _check_content_type(scope: Scope) -> None:
    """Raises `UnsupportedContentType` for a body that says it is something else than JSON, or compressed."""
    for name, value in scope["headers"]:  # every one: of several BentoML reads the first
        given = value.decode("latin-1").strip().lower()
        if name.lower() == b"content-type":
            content_type = given.split(";")[0].strip()
            if content_type != "application/json" and not content_type.endswith("+json"):
                raise UnsupportedContentType(f"content type: got {content_type[:60]}; allowed: application/json")
        elif name.lower() == b"content-encoding" and given not in ("identity", ""):
            raise UnsupportedContentType(f"content encoding: got {given[:60]}; allowed: none")


async def _read(receive: Receive, max_bytes: int, max_s: float, hold: Callable[[int], None]) -> bytes:
    """The whole body, each piece told to `hold` first.

    Raises `RequestTooLarge`, `DeadlineExceeded`, and `ClientDisconnect` if the client went away.
    """
    body = bytearray()  # however small its pieces
    try:
        async with asyncio.timeout(max_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                hold(len(message.get("body", b"")))
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise RequestTooLarge(f"the body is larger than {max_bytes} bytes; allowed: up to that")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"timeout: of the body came {len(body)} bytes in {max_s:g} s, and not its end"
        ) from error


async def _drop(receive: Receive) -> None:
    """What comes within `DROPPED_S`, up to the body's end or `DROPPED_BYTES`."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DROPPED_S):
            while num_bytes < DROPPED_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def _check_values(body: bytes, most: int) -> None:
    """Raises `RequestTooLarge` for a body of so many values that building them would stop the event loop."""
    is_large = len(body) > 2**20  # a smaller one is counted in 5 ms at worst
    if await asyncio.to_thread(exceeds_value_count, body, most) if is_large else exceeds_value_count(body, most):
        raise RequestTooLarge(f"the body holds more than {most} JSON values; allowed: up to that")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then what the real one gives (the disconnect)."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
