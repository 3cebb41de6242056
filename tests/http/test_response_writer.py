"""Responses are written without stopping the event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from embedder.engine.postprocess import Embedding
from embedder.http.dialects import local
from embedder.http.dialects.dialect import ServedModel
from embedder.http.request_body import EmbeddingRequest
from embedder.http.response_writer import ResponseWriter

MODEL = ServedModel("m", 60)
REQUEST = EmbeddingRequest((), True, "float")


def embeddings(count: int, size: int) -> list[Embedding]:
    return [Embedding(row, 40, 0) for row in np.random.default_rng(0).random((count, size), np.float32)]


@pytest.mark.parametrize("count", [1, 500])
def test_response_is_the_dialects(count: int) -> None:
    outcomes = embeddings(count, 192)
    written = asyncio.run(ResponseWriter().write(local.TEXTS, REQUEST, outcomes, MODEL))
    assert written == local.embedding_response(REQUEST, outcomes, MODEL)


def test_large_response_leaves_the_event_loop_its_turns() -> None:
    """Between two turns, the thread that writes has a part of the 0.1 s of CPU time that it takes."""
    outcomes = embeddings(2048, 2048)
    writer = ResponseWriter()
    clocks: list[int] = []
    seconds: list[float] = []

    def respond(*arguments: Any) -> bytes:
        clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
        return local.embedding_response(*arguments)

    async def write() -> None:
        dialect = replace(local.TEXTS, respond=respond)
        writing = asyncio.create_task(writer.write(dialect, REQUEST, outcomes, MODEL))
        while not writing.done():
            await asyncio.sleep(0)
            seconds.extend(map(time.clock_gettime, clocks))
        assert len(orjson.loads(await writing)["embedding"]) == 2048

    asyncio.run(write())
    assert max(later - earlier for earlier, later in itertools.pairwise(seconds)) < 0.05
    assert seconds[-1] - seconds[0] > 0.05
