"""Wraps BentoML's ASGI app: the middlewares go around it, and its error responses become raised errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import (
    CLIENT_CLOSED_REQUEST,
    EmbedderError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    RangeNotSatisfiable,
    RequestTooLarge,
    UnsupportedContentType,
)

API_PAGE = b"""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>API \xc2\xb7 Qwen3-VL-Embedding</title>
  <link rel="icon" type="image/svg+xml" href="playground/favicon.svg">
  <link rel="stylesheet" href="static_content/swagger-ui.css">
  <style>
    body { margin: 0; }
    nav { font: 16px/1.5 system-ui, sans-serif; margin: auto; max-width: 1460px; padding: 1rem 20px 0; }
    .swagger-ui .topbar { display: none; }
    .swagger-ui .wrapper { box-sizing: border-box; }
    @media (max-width: 40rem) {
      .swagger-ui .opblock .opblock-summary { flex-wrap: wrap; }
      .swagger-ui .opblock .opblock-summary-path { max-width: 100%; }
    }
  </style>
</head>
<body>
  <nav><a href="playground">Playground</a>: compare and search in the browser</nav>
  <div id="swagger-ui"></div>
  <script src="static_content/swagger-ui-bundle.js"></script>
  <script src="static_content/swagger-ui-standalone-preset.js"></script>
  <script src="static_content/swagger-initializer.js"></script>
</body>
</html>
"""

RAISED = "embedder.error"  # key of an ASGI message that carries an exception out through BentoML's middlewares


def serve_inside(service: Any, wrap: Callable[[ASGIApp], ASGIApp]) -> None:
    """Make a BentoML service serve `wrap(its own app)`.

    `Service.add_asgi_middleware` would put our middlewares inside BentoML's. Its timeout middleware keeps a timer for
    each request until the timeout has passed, also after the response, and hangs when an exception passes through.
    """

    class Wrapped(type(service)):  # type: ignore[misc]  # BentoML's Service class
        __slots__ = ()

        def to_asgi(self, is_main: bool = True) -> ASGIApp:
            return wrap(super().to_asgi(is_main))

    service.__class__ = Wrapped


def with_api_page(app: ASGIApp) -> ASGIApp:
    """BentoML's app with `API_PAGE` in the place of its page, which has no title, no link and no size for phones.

    Swagger UI's files are those that BentoML serves.
    """
    page = Response(API_PAGE, media_type="text/html")

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        await (page if is_page else app)(scope, receive, send)

    return respond


class RaisingErrors:
    """ASGI middleware: an error response of the app inside becomes an exception.

    A message with the key `RAISED` carries the exception itself; otherwise it is made from status and body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        body = b""

        async def watch(message: Message) -> None:
            nonlocal start, body
            if start is not None:
                body += message.get("body", b"")
            elif message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            else:
                await send(message)

        await self.app(scope, receive, watch)
        if start is not None:
            raise start.get(RAISED) or error_from_response(scope, start, body)


def raised_response(error: Exception) -> list[Message]:
    """Messages of a response that `RaisingErrors` turns into this exception."""
    status = 500
    if isinstance(error, EmbedderError):
        status = error.status
    elif isinstance(error, ClientDisconnect):
        status = CLIENT_CLOSED_REQUEST
    start = {"type": "http.response.start", "status": status, "headers": [], RAISED: error}
    return [start, {"type": "http.response.body", "body": b""}]


def error_from_response(scope: Scope, start: Message, body: bytes) -> EmbedderError:
    """The error that an error response of BentoML or Starlette stands for. `start`: its first ASGI message."""
    status: int = start["status"]
    match status:
        case 404:
            from embedder.http.routes import path_hint  # the parent process imports this module, and has no routes

            path = scope["path"][:100]
            nearest = path_hint(path)
            hint = f" (did you mean {nearest}?)" if nearest not in ("", path) else ""
            return NotFound(f"no such path: {path}{hint}; /openapi.json lists the paths")
        case 405:
            allow = dict(start.get("headers", ())).get(b"allow", b"").decode("latin-1")
            return MethodNotAllowed(f"{scope['path'][:100]} does not take {scope['method'][:20]}", allow=allow)
        case 413:
            return RequestTooLarge(_message(status, body))
        case 415:
            return UnsupportedContentType(_message(status, body))
        case 416:
            content_range = dict(start.get("headers", ())).get(b"content-range", b"").decode("latin-1")
            return RangeNotSatisfiable(
                f"range: the file has no such bytes; its size is {content_range.rpartition('/')[2]}",
                content_range=content_range,
            )
        case 503:
            return NotReady("the service is not ready")
    if status >= 500:
        return EmbedderError(_phrase(status))  # the body may tell something internal
    return InvalidRequest(_message(status, body))


def _message(status: int, body: bytes) -> str:
    """The text of `{"error": .., "detail": [pydantic's errors]}`, of `[{"error": ..}]`, or of plain text."""
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
