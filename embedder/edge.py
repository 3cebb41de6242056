"""The HTTP boundary, around BentoML's app: JSON within limits in, one shape of error out (under /v1 OpenAI's).

BentoML bounds no body, reads forms as well (a malformed one is an error 500), and answers errors of its own in three
shapes, none of them ours (BentoML 1.4.39).
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import EmbedderError, RequestTooLarge, UnsupportedContentType
from embedder.openai import openai_error_body
from embedder.response import error_body, to_json
from embedder.values import has_more_values

_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_content_type",
    503: "not_ready",
}


class Edge:
    """ASGI middleware. Reads a request's body whole, counting as it comes, and gives error answers our shape."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_values: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_values = max_values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, is_openai=scope["path"].startswith("/v1/"))
        if scope["method"] in ("POST", "PUT", "PATCH"):
            try:
                _check_content_type(scope)
                body = await _read(receive, self.max_body_bytes)
                await _check_values(body, self.max_values)
            except (RequestTooLarge, UnsupportedContentType) as error:
                await answer.error(413 if isinstance(error, RequestTooLarge) else 415, error)
                return
            except ClientDisconnect:  # while sending
                return
            receive = _replay(body, receive)
        await self.app(scope, receive, answer.send)


class _Answer:
    """Passes an answer on; one that is an error is held until it is whole, and mended where it is not ours."""

    def __init__(self, send: Send, *, is_openai: bool) -> None:
        self._send = send
        self._is_openai = is_openai
        self._start: Message = {}
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] < 400:
                await self._send(message)
            else:
                self._start = message
        elif not self._start:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error()

    async def error(self, status: int, error: EmbedderError) -> None:
        self._start = {"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]}
        self._body = error_body(error)
        await self._send_error()

    async def _send_error(self) -> None:
        status, body = self._start["status"], self._body
        if not body.startswith(b'{"error":{'):
            body = _reshape(status, body)
        if self._is_openai:
            body = openai_error_body(json.loads(body)["error"])
        replaced = (b"content-length", b"content-type")
        headers = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() not in replaced]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _reshape(status: int, body: bytes) -> bytes:
    code = _CODES.get(status, "invalid_request" if status < 500 else "internal_error")
    kind = "invalid_request" if status < 500 else "server_error"
    return to_json({"error": {"code": code, "message": _message(status, body), "item": None, "type": kind}})


def _message(status: int, body: bytes) -> str:
    """What BentoML's body says: `{"error": .., "detail": [pydantic's errors]}`, `[{"error": ..}]`, or plain text."""
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
    headers = {name.lower(): value for name, value in scope["headers"]}
    content_type = headers.get(b"content-type", b"application/json").decode("latin-1").split(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedContentType(f"content type: got {content_type[:60]}; allowed: application/json")
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in ("identity", ""):
        raise UnsupportedContentType(f"content encoding: got {encoding[:60]}; allowed: none")


async def _read(receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises `RequestTooLarge`, and `ClientDisconnect` if the client went away."""
    body = bytearray()  # however small its pieces
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise RequestTooLarge(f"the body is larger than {max_bytes} bytes; allowed: up to that")
        if not message.get("more_body", False):
            return bytes(body)


async def _check_values(body: bytes, most: int) -> None:
    """Raises `RequestTooLarge` for a body of so many values that building them would stop the event loop."""
    is_large = len(body) > 2**20  # a smaller one is counted in 5 ms at worst
    if await asyncio.to_thread(has_more_values, body, most) if is_large else has_more_values(body, most):
        raise RequestTooLarge(f"the body holds more than {most} JSON values; allowed: up to that")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then what the real one gives (the disconnect)."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
