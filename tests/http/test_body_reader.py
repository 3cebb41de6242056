"""A large body does not delay the event loop while it is read."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from starlette.requests import Request

from embedder.errors import InvalidRequest
from embedder.http.body_reader import READ_AT_ONCE_BYTES, BodyReader, ReadBody
from embedder.http.dialects import tei
from embedder.http.dialects.dialect import Dialect
from embedder.http.request_body import RequestBody
from embedder.settings import Settings


def request_with(body: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    scope = {"type": "http", "path": "/", "method": "POST", "headers": [], "query_string": b""}
    return Request(scope, receive)


def test_event_loop_runs_while_a_large_body_is_read() -> None:
    is_reading, loop_has_run = threading.Event(), threading.Event()

    def parse(fields: Any, _: Settings) -> bool:
        is_reading.set()
        return loop_has_run.wait(30)

    dialect: Dialect[Any] = Dialect("/", "", RequestBody, RequestBody, parse, lambda *_: b"", {})

    async def read() -> ReadBody:
        body = b'{"input": "' + b"a" * READ_AT_ONCE_BYTES + b'"}'
        reading = asyncio.create_task(BodyReader(Settings()).read([dialect], request_with(body)))
        while not is_reading.is_set():
            await asyncio.sleep(0.001)
        loop_has_run.set()
        return await reading

    assert asyncio.run(read()) == (dialect, True, 0)


@pytest.mark.parametrize("padding", [0, READ_AT_ONCE_BYTES], ids=["small", "large"])
def test_error_of_a_body_has_the_form_of_its_dialect(padding: int) -> None:
    body = b'{"inputs": 5}' + b" " * padding
    with pytest.raises(InvalidRequest, match="inputs: got 5") as caught:
        asyncio.run(BodyReader(Settings()).read([tei.EMBED], request_with(body)))
    assert tei.EMBED.errors
    assert caught.value.render == tei.EMBED.errors.render
