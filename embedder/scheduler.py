"""Waiting jobs -> which of them go next, under the token budget. No tensors, no threads, no clock of its own.

Cheap jobs go first, with ageing: a job's place is its arrival plus `SECONDS_PER_TOKEN` for each token it costs, so an
image of 1280 tokens lets a query overtake that came up to a quarter of a second later, and nothing starves.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job")

SECONDS_PER_TOKEN = 0.0002


@dataclass(order=True)
class _Waiting(Generic[Job]):
    place: float
    number: int
    cost: int = field(compare=False)
    job: Job = field(compare=False)


class Scheduler(Generic[Job]):
    """A queue that gives batches of at most `max_batch_tokens`; a single job over that goes alone."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.num_tokens = 0
        self._heap: list[_Waiting[Job]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, job: Job, cost: int, arrival_s: float) -> None:
        """Add a job that costs `cost` tokens and came at `arrival_s` (seconds on any steady clock)."""
        self._count += 1
        self.num_tokens += cost
        heapq.heappush(self._heap, _Waiting(arrival_s + cost * SECONDS_PER_TOKEN, self._count, cost, job))

    def take(self) -> list[Job]:
        """The next batch: first in order, up to the first job that does not fit. Empty if nothing waits."""
        jobs: list[Job] = []
        budget = self.max_batch_tokens
        while self._heap and (not jobs or self._heap[0].cost <= budget):
            first = heapq.heappop(self._heap)
            budget -= first.cost
            self.num_tokens -= first.cost
            jobs.append(first.job)
        return jobs
