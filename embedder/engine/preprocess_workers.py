"""Preprocesses items, in threads: fetching, decoding, resizing and tokenizing long texts release the GIL.

Items with URLs have a queue and threads of their own, so that a slow host delays only them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from embedder.engine.cache import content_key
from embedder.engine.job import Job, item_failed
from embedder.engine.observer import Observer
from embedder.engine.scheduler import Scheduler
from embedder.errors import EmbedderError
from embedder.inputs.address import has_url
from embedder.inputs.fetch import MAX_FETCHES
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.pairs import Query
from embedder.inputs.preprocess import ModelInput
from embedder.settings import Settings

logger = logging.getLogger(__name__)

Fetch = Callable[[EmbeddingItem, Callable[[], bool]], EmbeddingItem]
Preprocess = Callable[[EmbeddingItem], ModelInput]

READY_BYTES = 2**29  # of preprocessed items that wait for the device, about ten batches; at this size workers pause

# A fixed price, not a measurement: with it an image (300 estimated tokens) waits for short texts that arrive up to 2 s
# after it.
SECONDS_PER_ESTIMATED_TOKEN = 0.001


@dataclass(frozen=True)
class _Queue:
    jobs: Scheduler[Job]
    has_jobs: threading.Condition


class PreprocessWorkers:
    """Threads that run `preprocess_job` for queued jobs, one at a time, in the scheduler's order.

    A preprocessed job goes to `schedule`, a failed one with its error to `fail`. The engine calls `put`, `discard`,
    `add_ready_bytes`, `release_ready_bytes` and `close` under `lock`.
    """

    def __init__(
        self,
        lock: threading.RLock,
        settings: Settings,
        fetch: Fetch,
        preprocess: Preprocess,
        observer: Observer,
        *,
        schedule: Callable[[Job, bool], None],
        fail: Callable[[Job, EmbedderError], None],
    ) -> None:
        self._lock = lock
        self._fetch = fetch
        self._preprocess = preprocess
        self._observer = observer
        self._schedule = schedule
        self._fail = fail
        self._has_cache = settings.cache_bytes > 0
        self._fetches_urls = bool(settings.url_hosts)
        self._ready_bytes = 0
        self._is_closed = False
        self._items, self._fetches = (
            _Queue(Scheduler(0, SECONDS_PER_ESTIMATED_TOKEN), threading.Condition(lock)) for _ in range(2)
        )
        self._threads: list[threading.Thread] = []
        self._start(settings.preprocess_threads, "preprocess", self._items)
        if self._fetches_urls:
            self._start(MAX_FETCHES, "fetch", self._fetches)

    def __len__(self) -> int:
        """Number of jobs that wait for a thread."""
        return len(self._items.jobs) + len(self._fetches.jobs)

    def preprocess_job(self, job: Job, *, wake: bool = True) -> None:
        """Preprocess a job in the thread that calls. `wake` is passed to `schedule`."""
        try:
            with job.trace.preprocessing():
                job.model_input = self._preprocess(self._fetch(job.item, job.future.done))
                if self._has_cache:
                    job.key = content_key(job.model_input)
        except EmbedderError as error:
            self._observer.preprocessed(job.trace)
            self._fail(job, error)
        except KeyboardInterrupt:  # of a program that submits a short text
            job.future.cancel()
            raise
        except BaseException:  # a panic in a Rust library is not an Exception
            logger.exception("preprocessing failed")
            self._observer.preprocessed(job.trace)
            self._fail(job, item_failed())
        else:
            if not isinstance(job.item, Query):  # its tokens are counted with the pairs
                job.trace.count_tokens(job.model_input)
            self._observer.preprocessed(job.trace)
            self._schedule(job, wake)

    def put(self, job: Job, now_s: float) -> None:
        """Queue a job."""
        queue = self._fetches if self._fetches_urls and has_url(job.item) else self._items
        queue.jobs.put(job, job.num_tokens, job.request, now_s)
        queue.has_jobs.notify()

    def discard(self, job: Job) -> bool:
        """Remove a job that waits. False if it does not."""
        return self._items.jobs.discard(job) or self._fetches.jobs.discard(job)

    def add_ready_bytes(self, num_bytes: int) -> None:
        """Count a preprocessed item that waits for the device."""
        self._ready_bytes += num_bytes

    def release_ready_bytes(self, num_bytes: int) -> None:
        """Count an item that left, and wake the workers if they paused."""
        was_full = self._ready_bytes >= READY_BYTES
        self._ready_bytes -= num_bytes
        if was_full and self._ready_bytes < READY_BYTES:
            self._notify_all()

    def close(self) -> None:
        """Let the threads end."""
        self._is_closed = True
        self._notify_all()

    def join(self) -> None:
        """Wait for the threads' end."""
        for thread in self._threads:
            thread.join()

    def _start(self, num_threads: int, name: str, queue: _Queue) -> None:
        for number in range(num_threads):
            thread = threading.Thread(target=self._run, args=(queue,), name=f"{name}-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run(self, queue: _Queue) -> None:
        while job := self._next_job(queue):
            job.context.run(self.preprocess_job, job)
            del job  # or this frame would hold the item's pixels until the next job

    def _next_job(self, queue: _Queue) -> Job | None:
        """Wait for a job and for memory. None after `close`."""
        with self._lock:
            queue.has_jobs.wait_for(lambda: (len(queue.jobs) and self._ready_bytes < READY_BYTES) or self._is_closed)
            return next(iter(queue.jobs.take(time.monotonic())), None)

    def _notify_all(self) -> None:
        self._items.has_jobs.notify_all()
        self._fetches.has_jobs.notify_all()
