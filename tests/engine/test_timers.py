"""Time limits of requests, as `asyncio.timeout` has them, with few timers of the loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest

from embedder.engine import timers
from embedder.engine.timers import TimeLimit, start_timer

TICK_S = 0.02


def test_timers_expire_in_order_and_not_before_their_delay() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        ends: list[str] = []

        def start(name: str, delay_s: float) -> asyncio.Future[None]:
            """Ends when the timer does. Fails if that is too early; it may be late on a busy machine."""
            earliest_s, is_over = loop.time() + delay_s, loop.create_future()

            def end() -> None:
                ends.append(name)
                assert loop.time() >= earliest_s
                is_over.set_result(None)

            start_timer(delay_s, end)
            return is_over

        waits = [start("first", 5 * TICK_S), start("second", 5 * TICK_S)]
        await asyncio.sleep(TICK_S)
        waits += [start("third", 5 * TICK_S), start("short", TICK_S)]
        async with asyncio.timeout(10):
            await asyncio.gather(*waits)
        assert [name for name in ends if name != "short"] == ["first", "second", "third"]

    asyncio.run(run())


def test_cancelled_timer_does_nothing_even_if_it_was_due_in_the_same_turn() -> None:
    async def run() -> None:
        called = []
        second = None
        start_timer(TICK_S, lambda: second and second.cancel())
        second = start_timer(TICK_S, lambda: called.append("second"))
        start_timer(TICK_S, lambda: called.append("third"))
        start_timer(TICK_S, lambda: called.append("fourth")).cancel()
        await asyncio.sleep(3 * TICK_S)
        assert called == ["third"]

    asyncio.run(run())


def test_timer_that_raises_does_not_stop_the_others() -> None:
    async def run() -> None:
        called, errors = [], []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
        start_timer(TICK_S, lambda: 1 / 0)
        start_timer(TICK_S, lambda: called.append("second"))
        await asyncio.sleep(2 * TICK_S)
        start_timer(TICK_S, lambda: called.append("third"))
        await asyncio.sleep(2 * TICK_S)
        assert called == ["second", "third"]
        assert [type(error) for error in errors] == [ZeroDivisionError]

    asyncio.run(run())


def test_ended_timers_are_not_kept_and_the_loop_has_one_for_all() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(1000):
            start_timer(60, lambda: None).cancel()
        pending = [start_timer(60, lambda: None) for _ in range(10)]
        kept = timers._thread.timers[60]
        assert len(kept._timers) == len(pending)
        assert len(loop._scheduled) == 1  # type: ignore[attr-defined]
        loops.append(weakref.ref(loop))

    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    for _ in range(2):
        asyncio.run(run())
    gc.collect()
    assert loops[0]() is None
    assert loops[1]() is timers._thread.loop


def test_callback_has_no_context_of_a_request() -> None:
    request = contextvars.ContextVar("request", default="none")

    async def run() -> None:
        seen = []
        request.set("mine")
        start_timer(TICK_S, lambda: seen.append(request.get()))
        await asyncio.sleep(2 * TICK_S)
        assert seen == ["none"]

    asyncio.run(run())


async def _limited(block: Callable[[], Awaitable[None]], seconds: float, end_s: float = 0.0) -> str:
    try:
        with TimeLimit(seconds) as limit:
            if end_s:
                limit.extend_to(asyncio.get_running_loop().time() + end_s)
            await block()
    except TimeoutError:
        return "timeout"
    return "done"


@pytest.mark.parametrize(
    ("takes_s", "limit_s", "extended_s", "expected"),
    [
        (0, TICK_S, 0, "done"),
        (TICK_S, 5 * TICK_S, 0, "done"),
        (10, TICK_S, 0, "timeout"),
        (3 * TICK_S, TICK_S, 10, "done"),
        (10, TICK_S, 3 * TICK_S, "timeout"),
    ],
)
def test_time_limit_ends_the_block(takes_s: float, limit_s: float, extended_s: float, expected: str) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        assert await _limited(lambda: asyncio.sleep(takes_s), limit_s, extended_s) == expected
        if expected == "timeout":
            assert limit_s <= loop.time() - start_s < 5
            assert loop.time() - start_s >= extended_s
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        await asyncio.sleep(2 * TICK_S)  # nothing cancels the task afterwards

    asyncio.run(run())


def test_task_that_is_cancelled_by_others_stays_cancelled() -> None:
    async def run() -> None:
        task = asyncio.create_task(_limited(lambda: asyncio.sleep(10), 10))
        await asyncio.sleep(TICK_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_errors_of_the_block_are_not_changed() -> None:
    async def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(_limited(fail, 10))


def test_limits_inside_each_other() -> None:
    async def run(outer_s: float, inner_s: float) -> str:
        try:
            with TimeLimit(outer_s):
                return await _limited(lambda: asyncio.sleep(10), inner_s)
        except TimeoutError:
            return "outer"

    assert asyncio.run(run(5, TICK_S)) == "timeout"
    assert asyncio.run(run(TICK_S, 5)) == "outer"
