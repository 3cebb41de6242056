"""Requests for parts of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from embedder.http.byte_ranges import correct_range
from tests.http.asgi import call, status_and_error

CONTENT = b"0123456789"


def ask(folder: Path, *headers: tuple[bytes, bytes], method: str = "GET") -> tuple[int, str, bytes]:
    """Status, `Content-Range` and body."""
    path = folder / "file"
    path.write_bytes(CONTENT)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        correct_range(scope, path.stat().st_size)
        stays = {**scope, "asgi": {"spec_version": "2.4"}}  # or it would notice that the caller disconnects
        await FileResponse(path, stat_result=path.stat())(stays, receive, send)

    sent = call(app, method=method, headers=headers)
    if sent[0]["status"] >= 400:
        status, error = status_and_error([{**sent[0], "headers": _without_range(sent[0]["headers"])}, *sent[1:]])
        assert error["code"] == "range_not_satisfiable"
        assert status == sent[0]["status"]
    fields = dict(sent[0]["headers"])
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], fields.get(b"content-range", b"").decode(), body


def _without_range(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header[0] != b"content-range"]


@pytest.mark.parametrize(
    ("value", "content_range", "body"),
    [
        (b"bytes=0-4", "bytes 0-4/10", b"01234"),
        (b"bytes=8-", "bytes 8-9/10", b"89"),
        (b"bytes=-3", "bytes 7-9/10", b"789"),
        (b"bytes=-99", "bytes 0-9/10", CONTENT),
        (b"bytes=5-99", "bytes 5-9/10", b"56789"),
        (b"Bytes=0-1,,", "bytes 0-1/10", b"01"),
        (b"bytes=0-1, 50-60", "bytes 0-1/10", b"01"),
        (b"bytes=-0,3-3", "bytes 3-3/10", b"3"),
    ],
)
def test_range_is_sent(value: bytes, content_range: str, body: bytes, tmp_path: Path) -> None:
    assert ask(tmp_path, (b"range", value)) == (206, content_range, body)


def test_several_ranges_are_sent_together(tmp_path: Path) -> None:
    status, _, body = ask(tmp_path, (b"range", b"bytes=0-1,8-9"))
    assert (status, b"\r\n01\r\n" in body, b"\r\n89\r\n" in body) == (206, True, True)


@pytest.mark.parametrize(
    "value", [b"bytes=10-", b"bytes=10-20", b"bytes=-0", b"bytes=50-,60-70", b"bytes=9999999999999-"]
)
def test_range_after_the_end_is_refused_with_the_size(value: bytes, tmp_path: Path) -> None:
    status, content_range, body = ask(tmp_path, (b"range", value))
    assert (status, content_range) == (416, "bytes */10")
    assert b"range: the file has no such bytes; its size is 10" in body


@pytest.mark.parametrize(
    "value",
    [
        b"items=0-4",
        b"bytes",
        b"bytes=",
        b"bytes=-",
        b"bytes=a-b",
        b"bytes=5-2",
        b"bytes=0-1,x",
        b"bytes=1-2-3",
        b"",
        b"\xb2-",
    ],
)
def test_range_that_is_not_valid_is_ignored(value: bytes, tmp_path: Path) -> None:
    assert ask(tmp_path, (b"range", value)) == (200, "", CONTENT)


@pytest.mark.parametrize("value", [b"bytes=0-4", b"bytes=50-"])
def test_range_is_ignored_if_the_file_has_changed(value: bytes, tmp_path: Path) -> None:
    assert ask(tmp_path, (b"range", value), (b"if-range", b'"other"')) == (200, "", CONTENT)


def test_range_of_head_is_ignored(tmp_path: Path) -> None:
    assert ask(tmp_path, (b"range", b"bytes=50-"), method="HEAD") == (200, "", b"")
