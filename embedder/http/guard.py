"""What a request must satisfy before a route sees it: a key, plain JSON or files, and limits on bytes, time and values.

BentoML checks no keys and does not limit bodies. It also parses forms; a malformed one gives status 500 (1.4.40).
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.engine.callers import CALLER, EVERYONE, SharedCapacity
from embedder.engine.timers import TimeLimit
from embedder.errors import (
    DeadlineExceeded,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
    UnsupportedContentType,
)
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import METHODS_WITH_BODY, PROBES
from embedder.http.content_coding import decompress, request_coding
from embedder.http.drain import Drain
from embedder.http.json_limits import exceeds_value_count, max_values
from embedder.http.pieces import Pieces
from embedder.http.uploads import TYPES, is_upload
from embedder.settings import Settings

SMALL_BODY_BYTES = 2**16  # a body up to this size is accepted even when `max_held_bytes` is used up
# Counting the values of a smaller body takes 9 ms at most (one core of an AMD EPYC, `python -m benchmarks.micro`).
COUNTED_AT_ONCE_BYTES = 2**20
GRACE_S, MIN_BYTES_PER_S = 20.0, 500  # a body may be slower than this during the grace period
JSON = "application/json"
_BINARY_TENSORS = b"inference-header-content-length"  # of KServe's binary extension: the body is only partly JSON
_CHECKED_HEADERS = frozenset({b"content-type", b"content-encoding", _BINARY_TENSORS})
RETRY_AFTER_S = 1  # when `max_held_bytes` is used up: bodies are freed as soon as their requests end


class RequestGuard:
    """ASGI middleware: reads the whole body within limits, then passes the request on, or raises.

    Each body is limited, and so is the sum of all from their first byte to their response: decoding an image takes
    about three times the memory of its body. Probes and `open_paths` can be read without a key; probes also respond
    while the worker drains. `upload_paths` also take files.
    Raises `ShuttingDown`, `MissingKey`, `InvalidKey`, `UnsupportedContentType`, `RequestTooLarge`, `Overloaded`,
    `DeadlineExceeded` and `ClientDisconnect`.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        *,
        keys: ApiKeys,
        drain: Drain,
        open_paths: frozenset[str] = frozenset(),
        upload_paths: frozenset[str] = frozenset(),
        count_held_bytes: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.app = app
        self.settings = settings
        self.keys = keys
        self.drain = drain
        self.open_paths = open_paths | PROBES
        self.upload_paths = upload_paths
        self.count_held_bytes = count_held_bytes
        self.held_bytes = SharedCapacity(settings.max_held_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._check_access(scope)
        if scope["method"] not in METHODS_WITH_BODY:
            await self.app(scope, receive, send)
            return
        takes_files = scope["path"] in self.upload_paths
        coding, is_json = _check_content_type(scope, takes_files=takes_files)
        held = _HeldBytes(self)
        try:
            body = await self._read(receive, held.add)
            if coding:
                body = await self._decompress(coding, body, held.add)
            if is_json:
                body = _without_byte_order_mark(body)
                await self._check_values(body)
            await self.app(scope, _replay(body, receive), send)
        finally:
            held.release()

    def _check_access(self, scope: Scope) -> None:
        path = scope["path"]
        if self.drain.is_draining and path not in PROBES:
            raise ShuttingDown("the service is shutting down")
        is_open = path in self.open_paths and scope["method"] not in METHODS_WITH_BODY
        if is_open:
            return
        CALLER.set(self.keys.caller(scope["headers"]))

    async def _read(self, receive: Receive, hold: Callable[[int], None]) -> bytes:
        """The whole body; `hold` is called with the size of each piece first."""
        max_bytes, max_s = self.settings.max_body_bytes, self.settings.request_timeout_s
        pieces = Pieces()
        begin_s = asyncio.get_running_loop().time()
        try:
            with TimeLimit(min(max_s, GRACE_S)) as limit:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    hold(len(message.get("body", b"")))
                    pieces.add(message.get("body", b""))
                    if pieces.num_bytes > max_bytes:
                        raise RequestTooLarge(
                            f"the request body is larger than {max_bytes} bytes, the limit (EMBEDDER_MAX_BODY_BYTES)"
                        )
                    if not message.get("more_body", False):
                        break
                    limit.extend_to(begin_s + min(max_s, GRACE_S + pieces.num_bytes / MIN_BYTES_PER_S))
        except TimeoutError as error:
            spent_s = asyncio.get_running_loop().time() - begin_s
            raise DeadlineExceeded(
                f"the request body was not complete after {spent_s:.3g} s; received {pieces.num_bytes} bytes; allowed: "
                f"{max_s:g} s (EMBEDDER_REQUEST_TIMEOUT_S), and {MIN_BYTES_PER_S} bytes per second after {GRACE_S:g} s"
            ) from error
        return await pieces.join()

    async def _decompress(self, coding: str, body: bytes, hold: Callable[[int], None]) -> bytes:
        max_bytes, num_bytes = self.settings.max_body_bytes, 0

        def check(num_more: int) -> None:
            nonlocal num_bytes
            num_bytes += num_more
            if num_bytes > max_bytes:
                raise RequestTooLarge(
                    f"the request body is larger than {max_bytes} bytes after decompression, the limit "
                    "(EMBEDDER_MAX_BODY_BYTES)"
                )
            hold(num_more)

        return await decompress(coding, body, check)

    async def _check_values(self, body: bytes) -> None:
        """Refuse a body with so many JSON values that parsing it would stop the event loop."""
        allowed = max_values(self.settings.max_items_per_request)
        if len(body) <= COUNTED_AT_ONCE_BYTES:
            is_over = exceeds_value_count(body, allowed)
        else:
            is_over = await asyncio.to_thread(exceeds_value_count, body, allowed)
        if is_over:
            raise RequestTooLarge(
                f"the request body holds more than {allowed} JSON values, the limit, which grows with "
                "EMBEDDER_MAX_ITEMS_PER_REQUEST"
            )


class _HeldBytes:
    """The bytes of one request's body, as far as it has arrived."""

    def __init__(self, guard: RequestGuard) -> None:
        self._guard = guard
        self._caller = CALLER.get()
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Reserve the bytes of a piece of the body.

        Raises `Overloaded` when the sum of all bodies becomes too large, but never for a small body: a few large
        bodies that arrive slowly must not block the queries.
        """
        held, caller = self._guard.held_bytes, self._caller
        is_small = self._num_bytes + num_bytes <= SMALL_BODY_BYTES
        if not is_small and not held.fits(caller, num_bytes):
            whose = "" if caller == EVERYONE else " of this API key"
            raise Overloaded(
                f"request bodies{whose} of {held.used_by(caller)} bytes are being processed; allowed: "
                f"{held.allowed(caller)} now (EMBEDDER_MAX_HELD_BYTES)",
                retry_after_s=RETRY_AFTER_S,
            )
        self._count(num_bytes)

    def release(self) -> None:
        """Free the bytes."""
        self._count(-self._num_bytes)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._guard.held_bytes.add(self._caller, num_bytes)
        self._guard.count_held_bytes(num_bytes)


def _check_content_type(scope: Scope, *, takes_files: bool) -> tuple[str, bool]:
    """The coding that has to be undone, or an empty string, and whether the body is JSON.

    Raises `UnsupportedContentType`.
    """
    is_json, num_types, codings = True, 0, []
    for name, value in scope["headers"]:  # all of them: BentoML reads the first of several
        name = name.lower()
        if name not in _CHECKED_HEADERS:
            continue
        given = value.decode("latin-1").strip().lower()
        if name == _BINARY_TENSORS:
            raise UnsupportedContentType(
                "the body has binary tensors (header inference-header-content-length); allowed: JSON only, in "
                "tritonclient with binary_data=False in set_data_from_numpy"
            )
        if name == b"content-type":
            num_types += 1
            is_json &= not (takes_files and is_upload(given))
            if not is_json and num_types > 1:
                raise UnsupportedContentType(f"content type: got {given[:60]} and another one; allowed: one")
            if is_json:
                _check_json_type(given, takes_files=takes_files)
        else:
            codings.append(given)
    return request_coding(", ".join(codings)) if codings else "", is_json


def _check_json_type(given: str, *, takes_files: bool) -> None:
    if given == JSON:  # of most requests
        return
    content_type, *parameters = (part.strip() for part in given.split(";"))
    if content_type != JSON and not content_type.endswith("+json"):
        others = f", {', '.join(TYPES)}" if takes_files else ""
        hint = "; POST /img/embed takes files" if is_upload(content_type) and not takes_files else ""
        raise UnsupportedContentType(f"content type: got {content_type[:60]}; allowed: application/json{others}{hint}")
    for parameter in parameters:
        _check_charset(parameter)


def _check_charset(parameter: str) -> None:
    name, _, value = parameter.partition("=")
    charset = value.strip().strip("\"'")
    if name.strip() == "charset" and charset.replace("_", "-") not in ("", "utf-8", "utf8", "us-ascii", "ascii"):
        raise UnsupportedContentType(f"charset: got {charset[:60]}; allowed: utf-8")


def _without_byte_order_mark(body: bytes) -> bytes:
    """The body as UTF-8 without the mark that some writers put first. Raises `UnsupportedContentType` for others.

    JSON begins with an ASCII character, so a zero among its first two bytes means two or four bytes per character.
    """
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in body[:2]:
        raise UnsupportedContentType("charset: the body is UTF-16 or UTF-32; allowed: utf-8")
    return body.removeprefix(codecs.BOM_UTF8)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body once, then what the real one gives (the disconnect)."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
