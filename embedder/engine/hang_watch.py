"""Notices threads that do not finish an item. A thread cannot be ended, so only a new process helps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_S = 1.0


class HangWatch:
    """Calls `on_hang` once, with the reason, if an item takes more than `max_s` seconds.

    Time is counted in ticks of a thread: while the whole process is stopped, no item takes longer.
    """

    def __init__(self, max_s: float, on_hang: Callable[[str], None]) -> None:
        self._max_s = max_s
        self._on_hang = on_hang
        self._items: dict[int, tuple[str, float]] = {}  # by thread: what it does, and for how many seconds
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def item(self, kind: str) -> Iterator[None]:
        """Watch the calling thread while the block runs."""
        thread = threading.current_thread()
        with self._lock:
            self._items[thread.native_id or 0] = (f"thread {thread.name} has not preprocessed an item ({kind})", 0.0)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._items.pop(thread.native_id or 0, None)

    def close(self) -> None:
        """Stop watching."""
        self._is_closed.set()

    def _run(self) -> None:
        while not self._is_closed.wait(TICK_S):
            with self._lock:
                self._items = {key: (what, seconds + TICK_S) for key, (what, seconds) in self._items.items()}
                late = [what for what, seconds in self._items.values() if seconds > self._max_s]
            if late:
                self._on_hang(f"{late[0]} within {self._max_s:g} s")
                return
