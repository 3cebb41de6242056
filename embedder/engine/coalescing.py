"""Computes equal content once: a row in the cache is reused, and jobs that wait for the same content are coalesced.

A coalesced job keeps its own entry in the scheduler, because it may have a better position than the others. The first
of them that the scheduler chooses computes the row for all.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedder.engine.cache import VectorCache

Job = TypeVar("Job", bound=Hashable)


class CoalescingCache(Generic[Job]):
    """The vector cache, and by content key the jobs that wait for a row. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.vectors = VectorCache(max_bytes)
        self._waiting: dict[Hashable, dict[Job, None]] = {}
        self._computing: set[Hashable] = set()

    def find_row(self, key: Hashable) -> NDArray[np.float32] | None:
        """The cached row, (hidden_size,) float32, or None."""
        return self.vectors.get(key)

    def add_waiting(self, key: Hashable, job: Job) -> bool:
        """Let the job wait for its row. False if the row is being computed: then the job must not be scheduled."""
        self._waiting.setdefault(key, {})[job] = None
        return key not in self._computing

    def remove_waiting(self, key: Hashable, job: Job) -> None:
        """Forget the job if it waits."""
        jobs = self._waiting.get(key, {})
        jobs.pop(job, None)
        if not jobs:
            self._waiting.pop(key, None)

    def start_computing(self, key: Hashable, job: Job) -> bool:
        """Let the job compute the row. False if another job does already: then this one continues to wait."""
        if key in self._computing:
            return False
        self._computing.add(key)
        self.remove_waiting(key, job)
        return True

    def is_awaited(self, key: Hashable) -> bool:
        """True if a job waits for the row in addition to the one that computes it."""
        return key in self._waiting

    def store_row(self, key: Hashable, row: NDArray[np.float32]) -> list[Job]:
        """Cache the computed row, and return the coalesced jobs that it serves."""
        self.vectors.put(key, row)
        return self.stop_computing(key)

    def stop_computing(self, key: Hashable) -> list[Job]:
        """End a computation without a row, and return the coalesced jobs, which share its failure."""
        self._computing.discard(key)
        return list(self._waiting.pop(key, {}))
