"""The outermost middleware: what every request and every response of the service has in common.

A request gets an id and, if enabled, a line in the access log. A response gets the id as a header and, if it is an HTML
page, security headers. An error that is raised inside becomes a response here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import CLIENT_CLOSED_REQUEST, EmbedderError, system_limit, without_traceback
from embedder.http.drain import Drain
from embedder.http.error_forms import error_form
from embedder.telemetry.log import begin_request

logger = logging.getLogger(__name__)

PROBES = frozenset({"/livez", "/healthz", "/readyz", "/health", "/ping", "/v2/health/live", "/v2/health/ready"})
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

# How much of a refused request's body is still read, and dropped, before the connection is closed: many clients read no
# response before they have sent everything.
MAX_DROPPED_S, MAX_DROPPED_BYTES = 1.0, 2**24

_PAGES = frozenset({"/", "/playground/"})  # their links are relative, so their slash counts

_CLOSE = (b"connection", b"close")
_PAGE_HEADERS = [  # for pages without such headers of their own
    (
        b"content-security-policy",
        b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


class RequestBoundary:
    """ASGI middleware around everything else. `is_logged`: write a line for each request except probes.

    `other_names`: other names of some paths; inside, only the paths are known.
    """

    def __init__(
        self, app: ASGIApp, *, drain: Drain, is_logged: bool, other_names: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.app = app
        self.other_names = other_names
        self.drain = drain
        self.is_logged = is_logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = _without_trailing_slashes(scope["path"])
        scope = {**scope, "path": self.other_names.get(path, path)}
        request = begin_request(scope["headers"])
        body = _Body(receive, is_expected=scope["method"] in METHODS_WITH_BODY)
        response = _Response(send, request.id, self.drain)
        try:
            with self.drain:
                error = await self._error_of(scope, body, response)
                if error:
                    await response.send_error(error, _error_body(scope["path"], error), body)
        finally:
            if self.is_logged and scope["path"] not in PROBES:
                request.write(scope["method"], scope["path"], response.status or CLIENT_CLOSED_REQUEST)

    async def _error_of(self, scope: Scope, body: _Body, response: _Response) -> EmbedderError | None:
        """Run the request. Returns the error that ended it, without the frames that hold the body, or None."""
        try:
            await self.app(scope, body.receive, response.send)
        except ClientDisconnect:
            return None
        except EmbedderError as error:
            return without_traceback(error)
        except Exception as error:
            if response.status is not None:  # too late for an error response; the server closes the connection
                raise
            if limit := system_limit(error):
                request = scope["method"], scope["path"]
                logger.error("%s %s got 503, because a limit of the system is reached: %s", *request, limit.reason)
                return limit
            logger.exception("bug: %s %s failed", scope["method"], scope["path"])
            return EmbedderError(f"internal error; the service's log has the reason at request {response.request_id}")
        return None


def _without_trailing_slashes(path: str) -> str:
    """The path as the routes have it. A redirect would lose bodies."""
    return path if path in _PAGES else path.rstrip("/") or "/"


def _error_body(path: str, error: EmbedderError) -> bytes:
    return (error.render or error_form(path).render)(error)


class _Body:
    """A request's body as it arrives. `is_complete`: its end was seen, or there is none."""

    def __init__(self, receive: Receive, *, is_expected: bool) -> None:
        self._receive = receive
        self.is_complete = not is_expected

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):  # also of a disconnect
            self.is_complete = True
        return message

    async def drop(self) -> None:
        """Read and drop the rest of the body, up to `MAX_DROPPED_S` or `MAX_DROPPED_BYTES`."""
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_DROPPED_S):
                while not self.is_complete and num_bytes < MAX_DROPPED_BYTES:
                    num_bytes += len((await self.receive()).get("body", b""))


class _Response:
    """A response on its way out. `status` is None until it has begun."""

    def __init__(self, send: Send, request_id: str, drain: Drain) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self._send = send
        self._drain = drain

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send_start(message["status"], message.get("headers", ()))
        else:
            await self._send(message)

    async def send_error(self, error: EmbedderError, body: bytes, rest: _Body) -> None:
        """Send an error. If the request's body is not complete, drop the `rest`, and close the connection."""
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        is_left = not rest.is_complete
        await self._send_start(error.status, [*headers, _CLOSE] if is_left else headers)
        await self._send({"type": "http.response.body", "body": body, "more_body": is_left})
        if is_left:
            await rest.drop()
            await self._send({"type": "http.response.body"})

    async def _send_start(self, status: int, given: Iterable[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers, fields = [], {}
        for header in given:
            name = header[0].lower()
            if name != b"server" and not name.startswith(b"x-bentoml-"):
                headers.append(header)
                fields[name] = header[1]
        headers.append((b"x-request-id", self.request_id.encode()))
        if self._drain.is_draining and _CLOSE not in headers:
            headers.append(_CLOSE)
        if fields.get(b"content-type", b"").startswith(b"text/html") and b"content-security-policy" not in fields:
            headers += _PAGE_HEADERS
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
