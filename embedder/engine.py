"""Owns the queue and the threads; calls the steps in order, computes nothing itself.

A pool of threads preprocesses items as they come (decoding, resizing and tokenizing release the GIL); one thread
drives the device, taking from the scheduler whatever waits each time the device is free. Every item has a future of
its own: it fails alone, and a request may span batches.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embedder.errors import DeviceFailed, DeviceOutOfMemory, EmbedderError, EngineFailed, Overloaded, ShuttingDown
from embedder.postprocess import Embedding, check_dimensions, finish_vector
from embedder.preprocess import ModelInput
from embedder.request import EmbeddingItem, Image, Text, Video
from embedder.scheduler import Scheduler
from embedder.settings import Settings

logger = logging.getLogger(__name__)

Preprocess = Callable[[EmbeddingItem], ModelInput]
RunBatch = Callable[[list[ModelInput]], NDArray[np.float32]]


@dataclass(eq=False)
class _Job:
    """One item on its way. `num_tokens` were admitted for it; `model_input` is there once it was preprocessed."""

    item: EmbeddingItem
    num_tokens: int
    future: Future[Embedding] = field(default_factory=Future)
    model_input: ModelInput = field(init=False)


class Engine:
    """Items in, futures of embeddings out.

    `preprocess` turns one item into a ModelInput, in many threads at once. `run_batch` turns the inputs of a batch
    into pooled rows, (num_items, hidden_size) float32, in one thread; it raises `DeviceOutOfMemory` where they do not
    fit, and `DeviceFailed` where the device is lost. In that case, where a batch takes longer than `stuck_after_s`, and
    after a bug of ours, whatever waits fails, `failure` says why, and `on_failure` is called with it, once.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        run_batch: RunBatch,
        hidden_size: int,
        settings: Settings,
        *,
        stuck_after_s: float = math.inf,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.hidden_size = hidden_size
        self.settings = settings
        self.failure: str | None = None
        self._preprocess = preprocess
        self._run_batch = run_batch
        self._stuck_after_s = stuck_after_s
        self._on_failure = on_failure
        self._scheduler: Scheduler[_Job] = Scheduler(settings.max_batch_tokens)
        self._changed = threading.Condition()  # guards all that follows
        self._pending: set[_Job] = set()  # whoever takes a job out answers its future
        self._pending_tokens = 0
        self._tokens_per_s = 1000.0
        self._batch_since_s = math.inf  # when the batch on the device began
        self._is_closed = False
        self._is_over = False  # nothing will be put into the scheduler any more
        self._pool = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="preprocess")
        self._thread = threading.Thread(target=self._drive_device, name="engine", daemon=True)
        self._thread.start()
        if stuck_after_s < math.inf:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def pending_tokens(self) -> int:
        """Estimated tokens of all items that were admitted and have no answer yet."""
        return self._pending_tokens

    def submit(self, item: EmbeddingItem, *, wait: bool = False) -> Future[Embedding]:
        """Admit one item. The future gives its Embedding or raises an `EmbedderError`; cancelling it frees the place.

        Raises at once: `UnsupportedDimensions`, `ShuttingDown`, `DeviceFailed`, and `Overloaded` where the queue is
        full, unless `wait`: then it blocks until there is room.
        """
        check_dimensions(item.dimensions, self.hidden_size)
        job = _Job(item, _estimated_tokens(item))
        with self._changed:
            self._admit(job.num_tokens, wait)
            self._pending.add(job)
            self._pending_tokens += job.num_tokens
            self._pool.submit(self._prepare, job, time.monotonic())
        job.future.add_done_callback(lambda _: self._answer(job, None))
        return job.future

    def close(self) -> None:
        """Finish what was admitted, take nothing more, end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending)
            self._is_over = True
            self._changed.notify_all()
        if not self.failure:  # a thread that failed may hang for ever
            self._pool.shutdown()
            self._thread.join()

    def _admit(self, num_tokens: int, wait: bool) -> None:
        def has_room() -> bool:
            return not self._pending or self._pending_tokens + num_tokens <= self.settings.max_queued_tokens

        if wait:
            self._changed.wait_for(lambda: has_room() or self._is_closed)
        if self.failure:
            raise _lost()
        if self._is_closed:
            raise ShuttingDown("the service is shutting down")
        if not has_room():
            raise Overloaded(
                f"{self._pending_tokens} tokens wait; allowed: up to {self.settings.max_queued_tokens}",
                retry_after_s=max(1.0, self._pending_tokens / self._tokens_per_s),
            )

    def _answer(self, job: _Job, outcome: Embedding | EmbedderError | None) -> None:
        """Free the job's place and answer it, once: of several answers the first counts. None: it was cancelled."""
        with self._changed:
            if job not in self._pending:
                return
            self._pending.remove(job)
            self._pending_tokens -= job.num_tokens
            self._changed.notify_all()
        if not job.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Embedding):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)

    def _prepare(self, job: _Job, arrival_s: float) -> None:
        """One item's preprocessing, in a thread of the pool."""
        if job.future.cancelled():
            return
        try:
            job.model_input = self._preprocess(job.item)
        except EmbedderError as error:
            self._answer(job, error)
        except BaseException as error:  # a panic in a library written in Rust is no Exception
            logger.exception("preprocessing failed")
            self._answer(job, _hidden(error))
        else:
            with self._changed:
                self._scheduler.put(job, job.model_input.cost, arrival_s)
                self._changed.notify_all()

    def _drive_device(self) -> None:
        try:
            while jobs := self._next_batch():
                self._run(jobs)
        except DeviceFailed as error:
            self._give_up(f"the device failed: {error}")
        except BaseException:
            logger.exception("a bug ended the engine's thread")
            self._give_up("a bug ended the engine's thread")

    def _next_batch(self) -> list[_Job]:
        """Waits for work. Empty when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._scheduler) or self._is_over)
            return [] if self.failure else self._scheduler.take()

    def _run(self, jobs: list[_Job]) -> None:
        """One batch. If it fails it is split, until whoever spoils it fails alone."""
        jobs = [job for job in jobs if job in self._pending]
        if not jobs:
            return
        try:
            rows = self._timed_rows(jobs)
        except DeviceFailed:
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # or what they hold would be there while the halves run
            if len(jobs) == 1:
                logger.exception("the forward pass failed for one item of %d tokens", jobs[0].model_input.num_tokens)
                self._answer(jobs[0], _of_one_item(error, jobs[0]))
                return
            logger.warning("a batch of %d items failed (%s); splitting it", len(jobs), type(error).__name__)
            if isinstance(error, DeviceOutOfMemory):
                self._learn_limit(jobs)
        else:
            for job, row in zip(jobs, rows, strict=True):
                self._finish(job, row)
            return
        middle = len(jobs) // 2
        self._run(jobs[:middle])
        self._run(jobs[middle:])

    def _timed_rows(self, jobs: list[_Job]) -> NDArray[np.float32]:
        self._batch_since_s = start_s = time.monotonic()
        try:
            rows = self._run_batch([job.model_input for job in jobs])
        finally:
            self._batch_since_s = math.inf
        assert rows.shape == (len(jobs), self.hidden_size)
        num_tokens = sum(job.model_input.cost for job in jobs)
        self._tokens_per_s += 0.2 * (num_tokens / max(time.monotonic() - start_s, 1e-6) - self._tokens_per_s)
        return rows

    def _learn_limit(self, jobs: list[_Job]) -> None:
        """From a batch that did not fit: from now on batches are half as large, for as long as the process lives."""
        limit = sum(job.model_input.cost for job in jobs) // 2
        if limit < self._scheduler.max_batch_tokens:
            self._scheduler.max_batch_tokens = limit
            logger.warning("the device's memory is full: batches have at most %d tokens from now on", limit)

    def _finish(self, job: _Job, row: NDArray[np.float32]) -> None:
        try:
            vector = finish_vector(row, job.item.dimensions, job.item.normalize)
        except EngineFailed as error:
            logger.error("%s", error)
            self._answer(job, error)
        else:
            self._answer(job, Embedding(vector, job.model_input.num_tokens, job.model_input.num_cut_tokens))

    def _watch(self) -> None:
        """A batch that takes too long will not end: the thread that waits for it is given up."""
        while not self._is_over:
            since_s = self._batch_since_s
            if time.monotonic() - since_s > self._stuck_after_s:
                self._give_up(f"the device did not finish a batch within {self._stuck_after_s:g} s")
            time.sleep(min(1.0, self._stuck_after_s / 4))

    def _give_up(self, reason: str) -> None:
        """Nothing more will be embedded: everybody who waits is told."""
        with self._changed:
            if self.failure:
                return
            self.failure = reason
            self._is_closed = self._is_over = True
            jobs = list(self._pending)
            self._changed.notify_all()
        logger.critical("the engine gives up with %d items waiting: %s", len(jobs), reason)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for job in jobs:
            self._answer(job, _lost())
        if self._on_failure:
            self._on_failure(reason)


def _of_one_item(error: Exception, job: _Job) -> EngineFailed:
    """What the caller may know."""
    if isinstance(error, DeviceOutOfMemory):
        num_tokens = job.model_input.num_tokens
        return DeviceOutOfMemory(f"an item of {num_tokens} tokens does not fit the device's memory, even alone")
    return _hidden(error)


def _lost() -> DeviceFailed:
    return DeviceFailed("the service cannot embed any more and ends; its log has the reason")


def _hidden(error: BaseException) -> EngineFailed:
    """What a caller may know of an error that is ours."""
    failed = EngineFailed("the item could not be embedded; the service's log has the reason")
    failed.__cause__ = error
    return failed


def _estimated_tokens(item: EmbeddingItem) -> int:
    """A guess at admission, before anything is decoded: four characters a token, 300 tokens a picture or frame.

    An encoded clip counts as the longest: its frames together keep 7,864,320 pixels (`video`), two share a token.
    """
    estimate = 30
    for part in item.parts:
        match part:
            case Text():
                estimate += len(part.text) // 4
            case Image():
                estimate += 300
            case Video():
                estimate += 300 * len(part.source) if isinstance(part.source, tuple) else 7680
    return estimate
