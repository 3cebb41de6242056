"""Timers for the time limits of requests, which hardly ever expire.

A request has three of them. Timers with the same delay expire in the order in which they were started, so only the
first of them has to be a timer of the event loop. That saves 8% of the CPU time of a single text, if the model computes
nothing (`python -m benchmarks.front --base db5c607`, 64 callers, 2026-11-30).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import Context
from types import TracebackType


class Timer:
    """Calls `callback` once, after a delay, unless it is cancelled before. `end_s`: in the loop's time."""

    __slots__ = ("_callback", "_timers", "end_s")

    def __init__(self, end_s: float, callback: Callable[[], object], timers: dict[Timer, None]) -> None:
        self.end_s = end_s
        self._callback: Callable[[], object] | None = callback
        self._timers = timers

    def cancel(self) -> None:
        """Never call the callback."""
        self._callback = None
        self._timers.pop(self, None)

    def expire(self) -> None:
        """Call the callback, unless the timer was cancelled."""
        callback, self._callback = self._callback, None
        if callback:
            callback()


def start_timer(delay_s: float, callback: Callable[[], object]) -> Timer:
    """Start a timer of the running loop. The callback is called in an empty context."""
    loop = asyncio.get_running_loop()
    if _thread.loop is not loop:
        _thread.loop, _thread.timers = loop, {}
    timers = _thread.timers.get(delay_s)
    if timers is None:
        timers = _thread.timers[delay_s] = _Timers()
    return timers.start(loop, loop.time() + delay_s, callback)


class TimeLimit:
    """`asyncio.timeout` for the block: after `seconds`, the task in it is cancelled, and `TimeoutError` raised."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._has_expired = False

    def __enter__(self) -> TimeLimit:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancelled = task.cancelling()
        self._end_s = 0.0  # if it was extended
        self._timer: Timer | asyncio.TimerHandle = start_timer(self._seconds, self._expire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # if something else has cancelled the task too, it stays cancelled
        if self._has_expired and self._task.uncancel() <= self._num_cancelled and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def extend_to(self, end_s: float) -> None:
        """Let the limit end later, at this time of the loop."""
        self._end_s = end_s

    def _expire(self) -> None:
        loop = self._task.get_loop()
        if loop.time() < self._end_s:
            self._timer = loop.call_at(self._end_s, self._expire)
            return
        self._has_expired = True
        self._task.cancel()


class _Timers:
    """Timers of one loop with the same delay."""

    def __init__(self) -> None:
        self._timers: dict[Timer, None] = {}  # in the order of their ends
        self._is_waiting = False  # the loop will call `_expire`

    def start(self, loop: asyncio.AbstractEventLoop, end_s: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(end_s, callback, self._timers)
        self._timers[timer] = None
        if not self._is_waiting:
            self._wait(loop, end_s)
        return timer

    def _wait(self, loop: asyncio.AbstractEventLoop, end_s: float) -> None:
        self._is_waiting = True
        loop.call_at(end_s, self._expire, loop, context=Context())  # instead of the context of the first request

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_waiting = False
        now_s = loop.time()
        for timer in list(self._timers):
            if timer.end_s > now_s:
                self._wait(loop, timer.end_s)
                break
            del self._timers[timer]
            loop.call_soon(timer.expire, context=Context())


class _Thread(threading.local):
    """The last event loop that ran in this thread, and its timers by delay."""

    loop: asyncio.AbstractEventLoop | None = None
    timers: dict[float, _Timers]


_thread = _Thread()
