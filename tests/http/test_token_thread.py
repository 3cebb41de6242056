"""Counting tokens: one thread, in which no request waits forever, and nothing is done for callers that have left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from embedder.errors import DeadlineExceeded, Overloaded
from embedder.http import token_thread
from embedder.http.token_thread import MAX_WAITING_BYTES, TokenThread


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


class Work:
    """Waits for the gate. `num_calls`: how often it was begun."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate
        self.num_calls = 0

    def __call__(self) -> bytes:
        self.num_calls += 1
        assert self.gate.wait(30)
        return b"done"


async def started(thread: TokenThread, work: Work, num: int, num_bytes: int = 1) -> list[asyncio.Task[bytes]]:
    """So many requests, of which the first runs."""
    tasks = [asyncio.create_task(thread.run(work, num_bytes)) for _ in range(num)]
    while not work.num_calls:
        await asyncio.sleep(0.001)
    return tasks


def test_work_of_a_caller_that_has_left_is_not_begun(gate: threading.Event) -> None:
    async def run() -> None:
        work = Work(gate)
        thread = TokenThread(max_s=30)
        first, *left, last = await started(thread, work, 5)
        for task in left:
            task.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        assert await first == await last == b"done"
        assert work.num_calls == 2

    asyncio.run(run())


def test_request_whose_time_is_over_before_its_turn_is_not_begun(gate: threading.Event) -> None:
    async def run() -> None:
        work = Work(gate)
        results: list[Any] = await asyncio.gather(
            *await started(TokenThread(max_s=0.1), work, 3), return_exceptions=True
        )
        assert [type(one) for one in results] == [DeadlineExceeded] * 3
        assert "not done after 0.1 s" in str(results[1])
        gate.set()
        await asyncio.sleep(0.1)
        assert work.num_calls == 1

    asyncio.run(run())


def test_waiting_bodies_are_limited_but_one_of_any_size_is_accepted(gate: threading.Event) -> None:
    async def run() -> None:
        work, thread = Work(gate), TokenThread(max_s=30)
        (first,) = await started(thread, work, 1, num_bytes=2 * MAX_WAITING_BYTES)
        with pytest.raises(Overloaded, match=f"allowed: {MAX_WAITING_BYTES}"):
            await thread.run(work, 1)
        gate.set()
        assert await first == b"done"
        await asyncio.sleep(0.05)  # the thread has freed its bytes
        assert await thread.run(work, MAX_WAITING_BYTES) == b"done"

    asyncio.run(run())


def test_cancelled_request_frees_its_bytes(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_thread, "MAX_WAITING_BYTES", 10)

    async def run() -> None:
        work, thread = Work(gate), TokenThread(max_s=30)
        _, second = await started(thread, work, 2, num_bytes=5)
        second.cancel()
        await asyncio.sleep(0.01)
        third = asyncio.create_task(thread.run(work, 5))
        await asyncio.sleep(0.01)
        gate.set()
        assert await third == b"done"

    asyncio.run(run())
