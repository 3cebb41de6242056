"""Chooses which waiting jobs run next, within a token budget: fair queueing, shortest job first, with aging.

Each request has a first-in first-out queue, and only its first job competes with those of the caller's other requests.
That job's deadline is the start of its turn plus `STRETCH` times its expected duration; the earliest deadline runs
first. So a cheap job overtakes an expensive one, but only if it arrives before the expensive one's deadline approaches
(aging).

When a job has run, the turn of the next one starts at the time at which the device would have finished the job if it
had served only this request, but never so early that the new deadline has passed already. So requests share the device
by time, and a new request waits for one job of every other request, not for all of their jobs.

Callers compete by the same rules, each with the job that is next among its requests. So callers share the device by
time, too, and a new request waits for one job of every other caller, however many requests they send.

A request may have a `Delay`. Until the delay ends, the request's deadlines are later by that time; then they are
computed like those of other requests.

The module has no threads and no clock: the caller passes the time and holds a lock.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from embedder.engine.callers import EVERYONE

Job = TypeVar("Job", bound=Hashable)
Queue = TypeVar("Queue", bound=Hashable)

STRETCH = 8.0  # an image that takes the device 26 ms waits for texts that arrive up to 0.2 s after it
HALF_LIFE_S = 5.0


class BatchLength(NamedTuple):
    """A batch takes about `seconds` at most, because every item waits for the end of its batch, and for the batches
    that were launched before it. With fewer than `least_tokens`, the device would compute fewer items per second.
    """

    seconds: float
    least_tokens: int


# On a CPU, batches of more tokens embed hardly more items per second (`python -m benchmarks.choices`). On a GPU nothing
# is measured. There, a query waits for up to three batches, two of which were launched before it arrived: 78 ms next to
# bulk requests with a simulated 2B (p99, `python -m benchmarks.pretended_gpu`), and 155 ms if a batch takes 50 ms. By
# an H200's roofline and 3 us more for each kernel, batches of 50 ms and at least 4,096 tokens would embed 1 to 2% more
# items per second with the 2B, and 3 to 4% more with the 8B (`python -m benchmarks.gpu_counts --batch-tokens 2048`).
ON_CPU = BatchLength(0.25, 1024)
ON_GPU = BatchLength(0.025, 2048)


class Delay(NamedTuple):
    """Jobs of a request whose turns begin before `until_s` get deadlines that are `seconds` later."""

    seconds: float
    until_s: float


NO_DELAY = Delay(0.0, -math.inf)


class _Deadlines(Generic[Queue]):
    """Queues by their deadlines."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Queue]] = []  # by deadline, then by age
        self._entries: dict[Queue, int] = {}  # number of a queue's entry in the heap; those with others are stale
        self._num_entries = 0

    def put(self, queue: Queue, deadline_s: float) -> None:
        """Add a queue, or change its deadline."""
        self._num_entries += 1
        self._entries[queue] = self._num_entries
        entry = (deadline_s, self._num_entries, queue)
        if self._heap and self._heap[0][2] is queue:
            heapq.heapreplace(self._heap, entry)
        else:
            heapq.heappush(self._heap, entry)

    def remove(self, queue: Queue) -> None:
        """Remove a queue."""
        del self._entries[queue]

    def first(self) -> Queue | None:
        """The queue with the earliest deadline; None if there are no queues."""
        while self._heap:
            _, entry, queue = self._heap[0]
            if self._entries.get(queue) == entry:
                return queue
            heapq.heappop(self._heap)
        return None


@dataclass(eq=False)
class _CallerQueue(Generic[Job]):
    """The requests of one caller that have waiting jobs. `turn_s` is when the caller's turn started."""

    caller: Hashable
    turn_s: float
    requests: dict[Hashable, _RequestQueue[Job]] = field(default_factory=dict)
    deadlines: _Deadlines[_RequestQueue[Job]] = field(default_factory=_Deadlines)


@dataclass(eq=False)
class _RequestQueue(Generic[Job]):
    """The waiting jobs of one request with their costs.

    `turn_s` is when the turn of the first job started, and `patience_s` how long after that its deadline is.
    """

    caller: _CallerQueue[Job]
    request: Hashable
    turn_s: float
    delay: Delay
    patience_s: float = 0.0
    jobs: OrderedDict[Job, int] = field(default_factory=OrderedDict)


class Scheduler(Generic[Job]):
    """A queue that yields batches of at most `max_batch_tokens`; a job that exceeds it runs by itself.

    `batch_length` limits a batch too. `max_batch_tokens` and `seconds_per_token` may change any time.
    """

    def __init__(self, max_batch_tokens: int, seconds_per_token: float, batch_length: BatchLength = ON_CPU) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.seconds_per_token = seconds_per_token
        self._batch_length = batch_length
        self._callers: dict[Hashable, _CallerQueue[Job]] = {}
        self._queue_of: dict[Job, _RequestQueue[Job]] = {}
        self._deadlines: _Deadlines[_CallerQueue[Job]] = _Deadlines()

    def __len__(self) -> int:
        return len(self._queue_of)

    def put(
        self,
        job: Job,
        cost: int,
        request: Hashable,
        now_s: float,
        delay: Delay = NO_DELAY,
        caller: Hashable = EVERYONE,
    ) -> None:
        """Append a job of `cost` tokens to the queue of its request. `now_s` is the time of a steady clock."""
        caller_queue = self._callers.get(caller)
        if caller_queue is None:
            caller_queue = self._callers[caller] = _CallerQueue(caller, now_s)
        queue = caller_queue.requests.get(request)
        if queue is None:
            queue = caller_queue.requests[request] = _RequestQueue(caller_queue, request, now_s, delay)
        queue.jobs[job] = cost
        self._queue_of[job] = queue
        if len(queue.jobs) == 1:
            self._put_request(queue, now_s)
            if caller_queue.deadlines.first() is queue:
                self._put_caller(caller_queue, earliest_deadline_s=-math.inf)

    def take(self, now_s: float) -> list[Job]:
        """Remove and return the next batch: jobs in order, up to the first that does not fit. Empty if none waits."""
        jobs: list[Job] = []
        seconds, least_tokens = self._batch_length
        budget = min(self.max_batch_tokens, max(least_tokens, seconds / self.seconds_per_token))
        while (caller := self._deadlines.first()) and (queue := caller.deadlines.first()):
            job, cost = next(iter(queue.jobs.items()))
            if jobs and cost > budget:
                break
            budget -= cost
            jobs.append(job)
            queue.turn_s += cost * self.seconds_per_token
            caller.turn_s += cost * self.seconds_per_token
            self._remove(job, queue, earliest_deadline_s=now_s)
        return jobs

    def discard(self, job: Job) -> bool:
        """Remove a job; the next one of its request inherits its turn. False if the job does not wait."""
        queue = self._queue_of.get(job)
        if queue is None:
            return False
        self._remove(job, queue, earliest_deadline_s=-math.inf)
        return True

    def _remove(self, job: Job, queue: _RequestQueue[Job], earliest_deadline_s: float) -> None:
        was_first = next(iter(queue.jobs)) is job
        del queue.jobs[job], self._queue_of[job]
        if not was_first:
            return
        if queue.jobs:
            self._put_request(queue, earliest_deadline_s)
        else:
            queue.caller.deadlines.remove(queue)
            del queue.caller.requests[queue.request]
        self._put_caller(queue.caller, earliest_deadline_s)

    def _put_request(self, queue: _RequestQueue[Job], earliest_deadline_s: float) -> None:
        """Let the request compete with its first job, not before `earliest_deadline_s`."""
        queue.patience_s = STRETCH * next(iter(queue.jobs.values())) * self.seconds_per_token
        queue.turn_s = max(queue.turn_s, earliest_deadline_s - queue.patience_s)
        if earliest_deadline_s >= queue.delay.until_s:
            queue.delay = NO_DELAY
        queue.caller.deadlines.put(queue, queue.turn_s + queue.patience_s + queue.delay.seconds)

    def _put_caller(self, caller: _CallerQueue[Job], earliest_deadline_s: float) -> None:
        """Let the caller compete with its next job, not before `earliest_deadline_s`, or remove it if it has none."""
        first = caller.deadlines.first()
        if first is None:
            self._deadlines.remove(caller)
            del self._callers[caller.caller]
            return
        caller.turn_s = max(caller.turn_s, earliest_deadline_s - first.patience_s)
        self._deadlines.put(caller, caller.turn_s + first.patience_s + first.delay.seconds)


@dataclass
class Rate:
    """Recent seconds per token: a measurement's weight halves with every `HALF_LIFE_S` measured after it.

    `seconds_per_token` is the caller's guess until something was measured.
    """

    seconds_per_token: float
    _num_tokens: float = 0.0
    _seconds: float = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Add a measurement."""
        weight = 0.5 ** (seconds / HALF_LIFE_S)
        self._num_tokens = self._num_tokens * weight + num_tokens
        self._seconds = self._seconds * weight + seconds
        if self._num_tokens:
            self.seconds_per_token = self._seconds / self._num_tokens
