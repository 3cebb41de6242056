"""Waiting jobs -> which of them go next, under the token budget. No tensors, no threads, no clock of its own.

The jobs of a request stand in a line of their own, and only the first of each line competes. Its place is the moment
when its turn came plus `STRETCH` times as long as it will take; the lowest goes first. So cheap jobs go first, with
aging: a first job is overtaken only by those that come before its place. The turn of the next begins when the device,
had it been for this line alone, would be done with the one before, but never so early that its place would be past.
So lines share the device by time, and whoever comes is held up by one job of each line that was there, not by all.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job", bound=Hashable)

STRETCH = 8.0  # a picture that takes the device 26 ms lets texts overtake that come up to 0.2 s later
HALF_LIFE_S = 5.0

# A batch of a slow device is cut to what it computes in about `BATCH_S`: with more nothing goes faster, and everybody
# waits for the end of it. Below `LEAST_TOKENS` it would: items/s of the `small` shape (CPU, 43 tokens an item) in
# batches of up to 256, 512, 1024, 2048 and 16384 tokens: 27, 31, 36, 37, 38.
BATCH_S = 1.0
LEAST_TOKENS = 1024


@dataclass(eq=False)
class _Line(Generic[Job]):
    """The waiting jobs of one request, with their costs. `turn_s`: since when the first of them is the first."""

    request: Hashable
    turn_s: float
    jobs: OrderedDict[Job, int] = field(default_factory=OrderedDict)
    number: int = 0  # of the entry in the heap that stands for the first job; others are out of date


class Scheduler(Generic[Job]):
    """A queue that gives batches of at most `max_batch_tokens`; a single job over that goes alone.

    Where `seconds_per_token` says that so many take longer than `BATCH_S`, batches are smaller. Both numbers may be
    changed at any time.
    """

    def __init__(self, max_batch_tokens: int, seconds_per_token: float) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.seconds_per_token = seconds_per_token
        self.num_tokens = 0
        self._lines: dict[Hashable, _Line[Job]] = {}
        self._line_of: dict[Job, _Line[Job]] = {}
        self._heap: list[tuple[float, int, _Line[Job]]] = []  # by place, then by number
        self._count = 0

    def __len__(self) -> int:
        return len(self._line_of)

    def put(self, job: Job, cost: int, request: Hashable, now_s: float) -> None:
        """Add a job that costs `cost` tokens behind the others of its request (`now_s`: seconds on a steady clock)."""
        line = self._lines.setdefault(request, _Line(request, now_s))
        line.jobs[job] = cost
        self._line_of[job] = line
        self.num_tokens += cost
        if len(line.jobs) == 1:
            self._place_first(line, now_s)

    def take(self, now_s: float) -> list[Job]:
        """The next batch: first in order, up to the first job that does not fit. Empty if nothing waits."""
        jobs: list[Job] = []
        budget = min(self.max_batch_tokens, max(LEAST_TOKENS, BATCH_S / self.seconds_per_token))
        while self._heap:
            _, number, line = self._heap[0]
            if number == line.number:
                job, cost = next(iter(line.jobs.items()))
                if jobs and cost > budget:
                    break
                budget -= cost
                jobs.append(job)
                line.turn_s += cost * self.seconds_per_token
                self._remove(job, line, earliest_s=now_s)
            else:
                heapq.heappop(self._heap)
        return jobs

    def discard(self, job: Job) -> bool:
        """Take a job out of the queue, its turn going to the next of its line. False if it does not wait."""
        line = self._line_of.get(job)
        if line is None:
            return False
        self._remove(job, line, earliest_s=-math.inf)
        return True

    def _remove(self, job: Job, line: _Line[Job], earliest_s: float) -> None:
        """`earliest_s`: place of the next one, at the least."""
        was_first = next(iter(line.jobs)) is job
        self.num_tokens -= line.jobs.pop(job)
        del self._line_of[job]
        if not line.jobs:
            line.number = 0
            del self._lines[line.request]
        elif was_first:
            self._place_first(line, earliest_s)

    def _place_first(self, line: _Line[Job], earliest_s: float) -> None:
        patience_s = STRETCH * next(iter(line.jobs.values())) * self.seconds_per_token
        line.turn_s = max(line.turn_s, earliest_s - patience_s)
        self._count += 1
        line.number = self._count
        heapq.heappush(self._heap, (line.turn_s + patience_s, line.number, line))


@dataclass
class Rate:
    """Tokens a second of late: what was measured counts half as much after `HALF_LIFE_S` of measured time."""

    seconds_per_token: float  # a guess, until something was measured
    _num_tokens: float = 0.0
    _seconds: float = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """So many tokens took so long."""
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self._num_tokens = self._num_tokens * kept + num_tokens
        self._seconds = self._seconds * kept + seconds
        if self._num_tokens:
            self.seconds_per_token = self._seconds / self._num_tokens
