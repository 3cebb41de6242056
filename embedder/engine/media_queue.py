"""Chooses which item is decoded next in a process: small items overtake large ones, and their total memory is limited.

An item counts as small until it is known to need more than `START_BYTES`. Small items use memory that every process
has. Large items reserve theirs from a budget, and wait in this queue, not in a process, until enough of it is free.
One process takes only small items and another prefers large ones, so neither kind waits for the other. The module has
no threads and no clock: the caller passes the time and holds a lock.
"""

from __future__ import annotations

from embedder.engine.job import Job
from embedder.engine.scheduler import Scheduler
from embedder.inputs.decoder_process import START_BYTES

MAX_LARGE_BYTES = 2**31  # of all large items together; a larger one is decoded when no other large one is


class MediaQueue:
    """The items that wait for one of `num_processes` processes, which are numbered from 0."""

    def __init__(self, num_processes: int, seconds_per_token: float, max_large_bytes: int = MAX_LARGE_BYTES) -> None:
        self.num_processes = num_processes
        self.max_large_bytes = max_large_bytes
        self._small: Scheduler[Job] = Scheduler(0, seconds_per_token)
        self._large: Scheduler[Job] = Scheduler(0, seconds_per_token)
        self._next_large: Job | None = None  # the one whose turn it is, until its memory is free
        self._needed: dict[Job, int] = {}  # bytes of each large item that waits
        self._reserved: dict[Job, int] = {}  # bytes of each large item in a process

    def __len__(self) -> int:
        return len(self._small) + len(self._large) + (self._next_large is not None)

    def put(self, job: Job, num_bytes: int, now_s: float) -> None:
        """Add an item. `num_bytes`: bytes of memory to decode it; 0 if not known."""
        if num_bytes > START_BYTES:
            self._needed[job] = num_bytes
            self._large.put(job, job.num_tokens, job.request, now_s, job.delay, job.caller)
        else:
            self._small.put(job, job.num_tokens, job.request, now_s, job.delay, job.caller)

    def take(self, process: int, now_s: float) -> tuple[Job, int] | None:
        """Remove the next item for this process: the item, and the bytes of memory that it may use."""
        if self._takes_large(process) and process == 0:
            return self._take_large(now_s) or self._take_small(now_s)
        return self._take_small(now_s) or (self._take_large(now_s) if self._takes_large(process) else None)

    def grow(self, job: Job, process: int, num_bytes: int) -> bool:
        """Reserve memory for an item in a process that turns out to be large. False if it has to wait."""
        reserved = self._reserved.pop(job, 0)
        if self._takes_large(process) and self._fits(num_bytes):
            self._reserved[job] = num_bytes
            return True
        if reserved:
            self._reserved[job] = reserved
        return False

    def release(self, job: Job) -> None:
        """Free the memory of an item that left its process."""
        self._reserved.pop(job, None)

    def discard(self, job: Job) -> bool:
        """Remove an item that waits. False if it does not."""
        self._needed.pop(job, None)
        if job is self._next_large:
            self._next_large = None
            return True
        return self._small.discard(job) or self._large.discard(job)

    def _takes_large(self, process: int) -> bool:
        return process < self.num_processes - 1 or self.num_processes == 1

    def _take_small(self, now_s: float) -> tuple[Job, int] | None:
        jobs = self._small.take(now_s)
        return (jobs[0], START_BYTES) if jobs else None

    def _take_large(self, now_s: float) -> tuple[Job, int] | None:
        if self._next_large is None:
            self._next_large = next(iter(self._large.take(now_s)), None)
        job = self._next_large
        if job is None or not self._fits(self._needed[job]):
            return None
        self._next_large = None
        self._reserved[job] = num_bytes = self._needed.pop(job)
        return job, num_bytes

    def _fits(self, num_bytes: int) -> bool:
        return not self._reserved or sum(self._reserved.values()) + num_bytes <= self.max_large_bytes
