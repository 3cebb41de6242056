"""Preprocesses items, in threads: fetching, decoding, resizing and tokenizing long texts release the GIL.

Items with URLs have a queue and threads of their own, so that a slow host delays only them. Long texts have a queue and
one thread, so that they never occupy all the others. Clips, and images that could take long or much memory, have queues
too: they are decoded in processes (`decoder_process`), each driven by one thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from embedder.engine.cache import content_key
from embedder.engine.hang_watch import HangWatch
from embedder.engine.job import Job, item_failed
from embedder.engine.media_queue import MediaQueue
from embedder.engine.scheduler import Scheduler
from embedder.errors import EmbedderError, system_limit
from embedder.inputs.address import has_url
from embedder.inputs.decoder import Decoder, NeedsProcess, ProcessKilled, ThreadDecoder
from embedder.inputs.decoder_process import (
    START_TIMEOUT_S,
    DecoderProcess,
    EndReason,
    ProcessDecoder,
    can_start_processes,
)
from embedder.inputs.fetch import MAX_FETCHES
from embedder.inputs.items import EmbeddingItem, Video
from embedder.inputs.pairs import Query
from embedder.inputs.preprocess import LONG_CHARS, ModelInput, num_chars
from embedder.settings import Settings

logger = logging.getLogger(__name__)

Fetch = Callable[[EmbeddingItem, Callable[[], bool]], EmbeddingItem]

READY_BYTES = 2**29  # of preprocessed items that wait for the device, about ten batches; at this size workers pause
JOIN_S = 10.0  # for all threads to end
_NOT_WATCHED = nullcontext()

# A fixed price, not a measurement: with it an image (300 estimated tokens) waits for short texts that arrive up to 2 s
# after it.
SECONDS_PER_ESTIMATED_TOKEN = 0.001


class Preprocess(Protocol):
    """Turns an item into the model's input. Raises `NeedsProcess` if the decoder does."""

    def __call__(self, item: EmbeddingItem, decoder: Decoder) -> ModelInput: ...


@dataclass(frozen=True)
class _Queue:
    jobs: Scheduler[Job]
    has_jobs: threading.Condition


class PreprocessWorkers:
    """Threads that run `preprocess_job` for queued jobs, one at a time, in the scheduler's order.

    A preprocessed job goes to `schedule`, a failed one with its error to `fail`. The engine calls `put`, `discard`,
    `add_ready_bytes`, `release_ready_bytes` and `close` under `lock`. `watch` notices a thread that does not finish an
    item long after its deadline. `on_failure` is called with the reason when a thread ends with an error: the thread is
    lost, and the process has to be replaced.
    """

    def __init__(
        self,
        lock: threading.RLock,
        settings: Settings,
        fetch: Fetch,
        preprocess: Preprocess,
        on_decoder_end: Callable[[EndReason], None],
        *,
        schedule: Callable[[Job, bool], None],
        fail: Callable[[Job, EmbedderError], None],
        watch: HangWatch,
        on_failure: Callable[[str], None],
    ) -> None:
        self._lock = lock
        self._settings = settings
        self._fetch = fetch
        self._preprocess = preprocess
        self._schedule = schedule
        self._fail = fail
        self._on_failure = on_failure
        self._has_cache = settings.cache_bytes > 0
        self._fetches_urls = bool(settings.url_hosts)
        self._ready_bytes = 0
        self._num_fetched = 0  # items with fetched bytes that wait for a process
        self._is_closed = False
        self._items, self._long_texts, self._fetches = self._queues = tuple(
            _Queue(Scheduler(0, SECONDS_PER_ESTIMATED_TOKEN), threading.Condition(lock)) for _ in range(3)
        )
        self._decoder = ThreadDecoder() if can_start_processes() else Decoder()
        num_processes = settings.preprocess_threads + 1 if can_start_processes() else 0
        self._media = MediaQueue(num_processes, SECONDS_PER_ESTIMATED_TOKEN)
        self._idle: dict[int, threading.Condition] = {}  # of processes without an item
        self._processes = [DecoderProcess(settings, on_decoder_end) for _ in range(num_processes)]
        self._watch = watch
        # A decoding process may have to be started, and is itself ended at the deadline.
        self._max_item_s = settings.decode_timeout_s + START_TIMEOUT_S
        self._threads: list[threading.Thread] = []
        for number in range(settings.preprocess_threads):
            self._start(f"preprocess-{number}", self._run, self._items)
        self._start("long-texts", self._run, self._long_texts)
        for number in range(num_processes):
            self._start(f"decoder-{number}", self._run_process, number)
        for number in range(MAX_FETCHES if self._fetches_urls else 0):
            self._start(f"fetch-{number}", self._run, self._fetches)

    def __len__(self) -> int:
        """Number of jobs that wait for a thread or a process."""
        return sum([len(queue.jobs) for queue in self._queues]) + len(self._media)

    def preprocess_short(self, job: Job, *, wake: bool) -> None:
        """Preprocess a short text in the thread that calls. `wake` is passed to `schedule`."""
        self._preprocess_with(self._decoder, job, wake=wake, is_short=True)

    def preprocess_job(self, job: Job) -> None:
        """Preprocess a job in the thread that calls, or queue it for a process."""
        if need := self._preprocess_with(self._decoder, job):
            with self._lock:
                self._put_media(job, need.num_bytes, time.monotonic())

    def put(self, job: Job, now_s: float) -> None:
        """Queue a job."""
        if self._fetches_urls and has_url(job.item):
            queue = self._fetches
        elif self._processes and _has_clip(job.item):
            self._put_media(job, 0, now_s)
            return
        else:
            queue = self._long_texts if num_chars(job.item) > LONG_CHARS else self._items
        queue.jobs.put(job, job.num_tokens, job.request, now_s, job.delay, job.caller)
        queue.has_jobs.notify()

    def discard(self, job: Job) -> bool:
        """Remove a job that waits. False if it does not."""
        if self._media.discard(job):
            self._count_fetched(job, -1)
            return True
        return any(queue.jobs.discard(job) for queue in self._queues)

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
        """Let the threads end, and end the processes."""
        self._is_closed = True
        for process in self._processes:
            process.close()
        self._notify_all()

    def join(self, *others: threading.Thread) -> None:
        """Wait for the threads' end, and that of `others`, but not for one that hangs: it ends with this process."""
        deadline = time.monotonic() + JOIN_S
        threads = [*self._threads, *others]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if hanging := [thread.name for thread in threads if thread.is_alive()]:
            logger.error("closing without waiting for threads that have not ended: %s", ", ".join(hanging))

    def _start(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=self._run_to_end, args=(name, target, *arguments), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _run_to_end(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        """Run a thread. If it ends with an error, its job is lost, and nobody does its work."""
        try:
            target(*arguments)
        except BaseException:
            logger.exception("thread %s ended with an unexpected error", name)
            self._on_failure(f"thread {name} ended with an unexpected error")

    def _preprocess_with(
        self, decoder: Decoder, job: Job, *, wake: bool = True, is_short: bool = False
    ) -> NeedsProcess | None:
        """Preprocess a job and pass it on, or return what it needs. A short text has no URLs and cannot hang."""
        job.trace.preprocess_started_s = time.monotonic()
        try:
            item = job.item if is_short else job.fetched or self._fetch(job.item, job.future.done)
            with _NOT_WATCHED if is_short else self._watched(job):
                job.model_input = self._preprocess(item, decoder)
            if self._has_cache:
                job.key = content_key(job.model_input)
        except NeedsProcess as need:
            job.fetched = None if item is job.item else item
            return need.with_traceback(None)  # its frames hold the item's bytes
        except EmbedderError as error:
            if isinstance(error, ProcessKilled) and not job.is_repeated:
                job.is_repeated = True
                job.fetched = None if item is job.item else item
                return NeedsProcess()
            job.trace.preprocess_ended_s = time.monotonic()
            self._fail(job, error)
        except KeyboardInterrupt:  # of a program that submits a short text
            job.future.cancel()
            raise
        except BaseException as error:  # a panic in a Rust library is not an Exception
            limit = system_limit(error)
            if limit:
                logger.error("preprocessing failed, because a limit of the system is reached: %s", limit.reason)
            else:
                logger.exception("preprocessing failed")
            job.trace.preprocess_ended_s = time.monotonic()
            self._fail(job, limit or item_failed())
        else:
            job.trace.preprocess_ended_s = time.monotonic()
            if not isinstance(job.item, Query):  # its tokens are counted with the pairs
                job.trace.count_tokens(job.model_input)
            self._schedule(job, wake)
        return None

    def _watched(self, job: Job) -> AbstractContextManager[None]:
        name, kind = threading.current_thread().name, job.trace.kind
        return self._watch.step(f"thread {name} has not preprocessed an item ({kind})", self._max_item_s)

    # In threads without a process

    def _run(self, queue: _Queue) -> None:
        while job := self._next_job(queue):
            job.run(self.preprocess_job, job)
            del job  # or this frame would hold the item's pixels until the next job

    def _next_job(self, queue: _Queue) -> Job | None:
        """Wait for a job and for memory. None after `close`."""
        with self._lock:
            queue.has_jobs.wait_for(lambda: (len(queue.jobs) and self._has_memory(queue)) or self._is_closed)
            return next(iter(queue.jobs.take(time.monotonic())), None)

    def _has_memory(self, queue: _Queue) -> bool:
        return self._ready_bytes < READY_BYTES and (queue is not self._fetches or self._num_fetched < MAX_FETCHES)

    # In threads with a process

    def _run_process(self, number: int) -> None:
        process = self._processes[number]
        has_jobs = threading.Condition(self._lock)
        while taken := self._next_media(number, has_jobs):
            job, num_bytes = taken
            job.run(self._decode_job, job, num_bytes, process, number)
            del job, taken  # or this frame would hold the item's pixels until the next job
        process.stop()

    def _next_media(self, number: int, has_jobs: threading.Condition) -> tuple[Job, int] | None:
        """Wait for a job and for memory. None after `close`."""
        with self._lock:
            while not self._is_closed:
                if self._ready_bytes < READY_BYTES and (taken := self._media.take(number, time.monotonic())):
                    self._count_fetched(taken[0], -1)
                    return taken
                self._idle[number] = has_jobs
                has_jobs.wait()
                self._idle.pop(number, None)
            return None

    def _decode_job(self, job: Job, num_bytes: int, process: DecoderProcess, number: int) -> None:
        def grow(num_bytes: int) -> bool:
            with self._lock:
                return self._media.grow(job, number, num_bytes)

        decoder = ProcessDecoder(process, num_bytes, grow)
        need = self._preprocess_with(decoder, job)
        decoder.close()
        with self._lock:
            self._media.release(job)
            if need:
                self._put_media(job, need.num_bytes, time.monotonic())
            else:
                job.fetched = None
                self._wake_process()

    def _put_media(self, job: Job, num_bytes: int, now_s: float) -> None:
        if job.future.done():  # cancelled
            return
        self._media.put(job, num_bytes, now_s)
        self._count_fetched(job, 1)
        self._wake_process()

    def _wake_process(self) -> None:
        """Wake the first idle thread, so that no more processes are started than are needed."""
        if self._idle:
            self._idle.pop(min(self._idle)).notify()

    def _count_fetched(self, job: Job, by: int) -> None:
        if job.fetched:
            self._num_fetched += by
            self._fetches.has_jobs.notify_all()

    def _notify_all(self) -> None:
        for queue in self._queues:
            queue.has_jobs.notify_all()
        for has_jobs in self._idle.values():
            has_jobs.notify_all()


def _has_clip(item: EmbeddingItem) -> bool:
    return any(isinstance(part, Video) and not isinstance(part.source, tuple) for part in item.parts)
