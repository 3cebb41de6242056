"""Compressed bodies: decompresses requests within limits, and compresses responses for callers that accept it.

Every decompressor here returns pieces of limited size, so that a body of a few kilobytes cannot become gigabytes before
its size is checked.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import zstandard
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import InvalidRequest, UnsupportedContentType
from embedder.http.pieces import Pieces

CODINGS = ("gzip", "deflate", "zstd")
FIRST_BYTES, PIECE_BYTES = 2**16, 2**20  # of the first piece, which the event loop may make, and of the others
MAX_WINDOW_BYTES = 2**23  # of zstd, which RFC 8878 recommends to support; a frame may ask for gigabytes
MAX_MEMBERS = 1000  # gzip members or zstd frames in one body: an empty one costs microseconds
INLINE_BYTES = 2**14  # a body up to this size is decompressed in the event loop, up to its first piece

_ZLIB_INPUT_BYTES = 2**16  # given at once: zlib copies, with the GIL, what of it follows the end of a member
_ZSTD_FIRST_INPUT_BYTES, _ZSTD_INPUT_BYTES = 2**4, 2**8  # given at once: 4 bytes can become 128 KiB
_ALIASES = {"x-gzip": "gzip"}

MIN_COMPRESSED_BYTES = 2**10  # of a response: a smaller one fits in one packet anyway
COMPRESSED_IN_THREAD_BYTES = 2**14  # compressing fewer bytes takes less time than passing them to a thread
# For 100 vectors of 2,048 values in JSON, level 6 takes 131 ms instead of 18, for 9% fewer bytes (one core of an AMD
# EPYC, `python -m benchmarks.micro`).
LEVEL = 1


def request_coding(header: str) -> str:
    """The coding that a `Content-Encoding` header names, or an empty string. Raises `UnsupportedContentType`.

    Several codings, one around the other, are refused: no known client sends them, and limits would apply to each.
    """
    codings = [coding.strip() for coding in header.lower().split(",")]
    named = ", ".join(coding for coding in codings if coding not in ("", "identity"))  # which change nothing
    if not named:
        return ""
    coding = _ALIASES.get(named, named)
    if coding not in CODINGS:
        allowed = ", ".join(CODINGS)
        raise UnsupportedContentType(
            f"content encoding: got {named[:60]}; allowed: one of {allowed}", accept_encoding=allowed
        )
    return coding


async def decompress(coding: str, body: bytes, check: Callable[[int], None]) -> bytes:
    """Decompress a whole body, in threads unless it is small.

    `check` is called with the size of each piece before the next one is made, and may raise. Raises `InvalidRequest`.
    """
    pieces = _zstd_pieces(body) if coding == "zstd" else _zlib_pieces(coding, body)
    whole = Pieces()
    is_inline = len(body) <= INLINE_BYTES
    try:
        while (piece := next(pieces, None) if is_inline else await asyncio.to_thread(next, pieces, None)) is not None:
            check(len(piece))
            whole.add(piece)
            is_inline = False
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise InvalidRequest(f"the body is not valid {coding}: {error}") from error
    return await whole.join()


def _zlib_pieces(coding: str, body: bytes) -> Iterator[bytes]:
    start, size = 0, FIRST_BYTES
    for _ in range(MAX_MEMBERS):
        member = zlib.decompressobj(_window_bits(coding, body[start : start + 2]))
        while not member.eof:
            given = body[start : start + _ZLIB_INPUT_BYTES]
            piece = member.decompress(given, size)
            used = len(given) - len(member.unused_data if member.eof else member.unconsumed_tail)
            start += used
            if piece:
                yield piece
                size = PIECE_BYTES
            elif not used and not member.eof:
                raise EOFError("it is cut off")
        if start == len(body):
            return
        if coding == "deflate":
            raise EOFError("more bytes follow its end")
    raise EOFError(f"it has more than {MAX_MEMBERS} members, the limit")


def _window_bits(coding: str, body: bytes) -> int:
    """Zlib's parameter for the format. Some clients send `deflate` without zlib's header."""
    if coding == "gzip":
        return 16 + zlib.MAX_WBITS
    has_header = len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


def _zstd_pieces(body: bytes) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    start, size, num_given = 0, FIRST_BYTES, _ZSTD_FIRST_INPUT_BYTES
    for _ in range(MAX_MEMBERS):
        frame, pending = decompressor.decompressobj(), bytearray()
        while not frame.eof:
            if start >= len(body):
                raise EOFError("it is cut off")
            pending += frame.decompress(body[start : start + num_given])
            start += num_given
            if len(pending) >= size:
                yield bytes(pending)
                pending.clear()
                size, num_given = PIECE_BYTES, _ZSTD_INPUT_BYTES
        yield bytes(pending)
        start = min(start, len(body)) - len(frame.unused_data)
        if start == len(body):
            return
    raise EOFError(f"it has more than {MAX_MEMBERS} frames, the limit")


class CompressedResponses:
    """ASGI middleware: compresses a response with gzip if the caller accepts it and the response is large enough.

    Starlette's GZipMiddleware compresses in the event loop: a second for the vectors of 2,000 texts.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not accepts_gzip(scope["headers"]):
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def compress(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                first, start = start, None
                if _is_worth_it(first, message):
                    first, message = await _compressed(first, message)
                await send(first)
            await send(message)

        await self.app(scope, receive, compress)


def accepts_gzip(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether `Accept-Encoding` names gzip, or `*`, with a weight above 0 (RFC 9110, section 12.5.3)."""
    return _names_gzip(b",".join([value for name, value in headers if name == b"accept-encoding"]))


@lru_cache(maxsize=64)  # each client library sends one value; `server.connection` limits its length
def _names_gzip(accepted: bytes) -> bool:
    weights: dict[str, float] = {}
    for part in accepted.decode("latin-1").lower().split(","):
        coding, _, parameter = part.partition(";")
        weight = parameter.strip().removeprefix("q=")
        is_number = weight.replace(".", "", 1).isdecimal()
        weights[coding.strip()] = float(weight) if is_number else 1.0
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def _is_worth_it(start: Message, body: Message) -> bool:
    fields = {name.lower(): value for name, value in start["headers"]}
    kind = fields.get(b"content-type", b"")
    return (
        not body.get("more_body", False)
        and len(body.get("body", b"")) >= MIN_COMPRESSED_BYTES
        and b"content-encoding" not in fields
        and (kind.startswith((b"application/json", b"text/")) or b"+json" in kind)
    )


async def _compressed(start: Message, body: Message) -> tuple[Message, Message]:
    content: bytes = body["body"]
    small = len(content) < COMPRESSED_IN_THREAD_BYTES
    content = _gzip(content) if small else await asyncio.to_thread(_gzip, content)
    replaced = (b"content-length", b"etag")
    headers = [(name, value) for name, value in start["headers"] if name.lower() not in replaced]
    headers += [
        (b"content-encoding", b"gzip"),
        (b"content-length", str(len(content)).encode()),
        (b"vary", b"accept-encoding"),
    ]
    return {**start, "headers": headers}, {**body, "body": content}


def _gzip(content: bytes) -> bytes:
    compressor = zlib.compressobj(LEVEL, wbits=16 + zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()
