"""The thread in which the routes that count and show tokens work: one, so that they take no core from embedding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from embedder.engine.timers import TimeLimit
from embedder.errors import DeadlineExceeded, Overloaded

MAX_WAITING_BYTES = 2**23  # of bodies, together
RETRY_AFTER_S = 1


class TokenThread:
    """Runs one function after the other. `max_s`: until a request has its result."""

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._thread = ThreadPoolExecutor(1, "tokenize")
        self._num_waiting_bytes = 0  # of the function that runs, too

    async def run(self, work: Callable[[], bytes], num_bytes: int) -> bytes:
        """The result of `work`, which reads a body of this size.

        It is not called if its time is over, or its caller has left, before its turn. Raises `DeadlineExceeded`, and
        `Overloaded` if the bodies before it are large.
        """
        if self._num_waiting_bytes and self._num_waiting_bytes + num_bytes > MAX_WAITING_BYTES:
            raise Overloaded(
                f"bodies of {self._num_waiting_bytes} bytes wait to be tokenized, and this one has {num_bytes}; "
                f"allowed: {MAX_WAITING_BYTES}",
                retry_after_s=RETRY_AFTER_S,
            )
        result = self._thread.submit(work)
        self._num_waiting_bytes += num_bytes
        loop = asyncio.get_running_loop()

        def forget(_: Future[bytes]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._forget, num_bytes)

        result.add_done_callback(forget)
        try:
            with TimeLimit(self._max_s):
                return await asyncio.wrap_future(result)
        except TimeoutError as error:
            raise DeadlineExceeded(f"timeout: not done after {self._max_s:g} s") from error

    def _forget(self, num_bytes: int) -> None:
        self._num_waiting_bytes -= num_bytes
