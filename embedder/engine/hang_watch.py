"""Notices threads that do not finish a step. A thread cannot be ended, so only a new process helps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_S = 1.0


class HangWatch:
    """Calls `on_hang` once, with the reason, if a step takes too long.

    Time is counted in ticks of a thread: while the whole process is stopped, no step takes longer.
    """

    def __init__(self, on_hang: Callable[[str], None]) -> None:
        self._on_hang = on_hang
        self._steps: dict[int, tuple[str, float, float]] = {}  # by thread: reason, limit, seconds so far
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def step(self, reason: str, max_s: float) -> Iterator[None]:
        """Watch the calling thread while the block runs. It may take `max_s` seconds."""
        thread = threading.get_ident()
        with self._lock:
            self._steps[thread] = reason, max_s, 0.0
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._steps.pop(thread, None)

    def close(self) -> None:
        """Stop watching."""
        self._is_closed.set()

    def _run(self) -> None:
        while not self._is_closed.wait(TICK_S):
            if reason := self._count_tick():
                self._on_hang(reason)
                return

    def _count_tick(self) -> str | None:
        """Add a tick to each step. Returns the reason if one takes too long."""
        with self._lock:
            for thread, (reason, max_s, seconds) in self._steps.items():
                if seconds + TICK_S > max_s:
                    return f"{reason} within {max_s:g} s"
                self._steps[thread] = reason, max_s, seconds + TICK_S
        return None
