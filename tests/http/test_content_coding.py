"""Compressed requests and responses: every coding, within the limits, and bombs."""

from __future__ import annotations

import asyncio
import gzip
import random
import struct
import zlib
from typing import Any

import pytest
import zstandard
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import EmbedderError, InvalidRequest
from embedder.http.api_keys import ApiKeys
from embedder.http.content_coding import (
    MAX_MEMBERS,
    MAX_WINDOW_BYTES,
    PIECE_BYTES,
    CompressedResponses,
    accepts_gzip,
    decompress,
    request_coding,
)
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.settings import Settings
from tests.http.asgi import Echo, call, chunks, status_and_error


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


CODED: dict[str, tuple[str, Any]] = {
    "gzip": ("gzip", gzip.compress),
    "members": ("gzip", lambda data: gzip.compress(data[:3]) + gzip.compress(b"") + gzip.compress(data[3:])),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "zstd": ("zstd", zstandard.compress),
    "frames": ("zstd", lambda data: zstandard.compress(data[:3]) + zstandard.compress(data[3:])),
}


def sizes_of(coding: str, body: bytes) -> tuple[bytes, list[int]]:
    """The decompressed body, and the sizes of the pieces that were checked."""
    sizes: list[int] = []
    return asyncio.run(decompress(coding, body, sizes.append)), sizes


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_first_piece_is_small_because_the_event_loop_may_make_it(coding: str) -> None:
    _, sizes = sizes_of(coding, CODED[coding][1](bytes(8 * PIECE_BYTES)))
    assert sizes[0] < PIECE_BYTES <= max(sizes)


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("size", [0, 1, 10, 300_000, 3_000_000])
def test_body_is_decompressed_in_bounded_pieces(kind: str, size: int) -> None:
    coding, compress = CODED[kind]
    data = random.Random(0).randbytes(size // 2) + b"a" * (size - size // 2)
    body, sizes = sizes_of(coding, compress(data))
    assert body == data
    assert sum(sizes) == size
    assert max(sizes, default=0) <= 10 * PIECE_BYTES


@pytest.mark.parametrize("kind", CODED)
def test_body_that_is_damaged_or_cut_off_is_refused(kind: str) -> None:
    coding, compress = CODED[kind]
    whole = compress(b"some text" * 50)
    for body in (b"", b"\x00", b"nonsense" * 9, whole[:-1], whole[: len(whole) // 2], whole + b"more", whole[1:]):
        if body[len(whole) :] == b"more" and coding == "gzip":
            continue  # some writers pad the end; zlib says what is wrong below
        with pytest.raises(InvalidRequest, match=f"^the body is not valid {coding}: "):
            sizes_of(coding, body)


@pytest.mark.parametrize("kind", CODED)
def test_bomb_is_refused_after_a_few_pieces(kind: str) -> None:
    coding, compress = CODED[kind]
    bomb, seen = compress(bytes(2**26)), [0]

    def check(size: int) -> None:
        seen[0] += size
        if seen[0] > 2**22:
            raise OverflowError

    with pytest.raises(OverflowError):
        asyncio.run(decompress(coding, bomb, check))
    assert seen[0] < 2**22 + 10 * PIECE_BYTES


def test_members_and_windows_are_limited() -> None:
    for coding, member in (("gzip", gzip.compress(b"")), ("zstd", zstandard.compress(b""))):
        with pytest.raises(InvalidRequest, match=f"more than {MAX_MEMBERS}"):
            sizes_of(coding, member * (MAX_MEMBERS + 1))
    window = 2 * MAX_WINDOW_BYTES
    frame = struct.pack("<IBB", zstandard.MAGIC_NUMBER, 0, (window.bit_length() - 11) << 3) + b"\x01\x00\x00"
    with pytest.raises(InvalidRequest, match="the body is not valid zstd: "):
        sizes_of("zstd", frame)


def test_members_are_not_copied_with_all_that_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 1000 members before 60 MB, zlib would copy 60 GB, with the GIL."""
    num_bytes, decompressobj = 0, zlib.decompressobj

    class Counting:
        def __init__(self, bits: int) -> None:
            self.member = decompressobj(bits)

        def decompress(self, data: bytes, most: int) -> bytes:
            nonlocal num_bytes
            num_bytes += len(data)
            return self.member.decompress(data, most)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.member, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    body = gzip.compress(b"") * 100 + gzip.compress(random.Random(0).randbytes(2**22))
    assert len(sizes_of("gzip", body)[0]) == 2**22
    assert num_bytes < 4 * len(body)


@pytest.mark.parametrize("kind", CODED)
def test_limit_holds_after_decompression(kind: str) -> None:
    coding, compress = CODED[kind]
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    limits = {"max_body_bytes": 100, "max_held_bytes": 1000, "max_items_per_request": 100}
    guarded = RequestGuard(app, Settings().model_copy(update=limits), keys=ApiKeys(Settings()), drain=Drain())
    for size, is_allowed in ((100, True), (101, False), (10_000, False)):
        sent = asyncio.run(_post(guarded, compress(b"x" * size), coding))
        assert sent == (200 if is_allowed else "request_too_large")
        assert guarded.held_bytes.used == 0
    assert seen == [b"x" * 100]


async def _post(app: RequestGuard, body: bytes, coding: str) -> int | str:
    statuses: list[int] = []
    messages = iter(chunks(body))

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        statuses.append(message.get("status", 0))

    headers = [(b"content-encoding", coding.encode())]
    try:
        await app({"type": "http", "path": "/embed", "method": "POST", "headers": headers}, receive, send)
    except EmbedderError as error:
        return error.code
    return statuses[0]


@pytest.mark.parametrize("header", ["gzip", "identity, gzip", "GZIP , identity", "gzip,", "x-gzip"])
def test_identity_among_the_codings_changes_nothing(header: str) -> None:
    assert request_coding(header) == "gzip"
    assert request_coding("identity, identity") == request_coding(" ") == ""


@pytest.mark.parametrize("num_lines", [1, 2], ids=["one header", "a header for each"])
@pytest.mark.parametrize("coding", ["br", "compress", "gzip, zstd", "gzip, gzip", "gzip, br", "identity, br"])
def test_other_codings_are_refused_by_name(coding: str, num_lines: int) -> None:
    app = Echo()
    headers = [(b"content-encoding", value.encode()) for value in coding.split(", ", num_lines - 1)]
    sent = call(app, chunks(b"{}"), headers=headers)
    status, error = status_and_error(sent)
    named = coding.removeprefix("identity, ")
    assert (status, error["message"]) == (415, f"content encoding: got {named}; allowed: one of gzip, deflate, zstd")
    assert dict(sent[0]["headers"])[b"accept-encoding"] == b"gzip, deflate, zstd"
    assert app.calls == 0


def test_a_wrong_type_does_not_look_like_a_wrong_coding() -> None:
    sent = call(Echo(), chunks(b"{}"), headers=[(b"content-type", b"text/xml"), (b"content-encoding", b"gzip")])
    assert sent[0]["status"] == 415
    assert b"accept-encoding" not in dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("value", "is_accepted"),
    [
        ("gzip", True),
        ("gzip, deflate, br", True),
        ("GZIP;q=0.5", True),
        ("*", True),
        ("x-gzip", True),
        ("x-gzip;q=0", False),
        ("identity, *;q=0.1", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.0, *", False),
        ("br", False),
        ("xgzip", False),
    ],
)
def test_gzip_is_used_only_if_accepted(value: str, is_accepted: bool) -> None:
    assert accepts_gzip([(b"accept-encoding", value.encode())]) == is_accepted


def respond(body: bytes, accept: bytes, kind: bytes = b"application/json") -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of a response through the middleware."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def run() -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "headers": [(b"accept-encoding", accept)]}
        wrapped: ASGIApp = CompressedResponses(app)
        await wrapped(scope, receive, send)

    asyncio.run(run())
    headers = dict(sent[0]["headers"])
    assert headers[b"content-length"] == str(len(sent[1]["body"])).encode()
    return headers, sent[1]["body"]


@pytest.mark.parametrize("size", [5_000, 500_000])
def test_response_is_compressed_for_who_asks(size: int) -> None:
    content = b"0.123," * (size // 6)
    headers, body = respond(content, b"gzip")
    assert (headers[b"content-encoding"], headers[b"vary"]) == (b"gzip", b"accept-encoding")
    assert len(body) < size / 10
    assert gzip.decompress(body) == content


@pytest.mark.parametrize(
    ("size", "accept", "kind"),
    [(5000, b"identity", b"application/json"), (100, b"gzip", b"application/json"), (5000, b"gzip", b"image/webp")],
)
def test_response_stays_as_it_is_otherwise(size: int, accept: bytes, kind: bytes) -> None:
    headers, body = respond(b"x" * size, accept, kind)
    assert b"content-encoding" not in headers
    assert body == b"x" * size
