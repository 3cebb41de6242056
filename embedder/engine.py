"""Owns the queue and the threads; calls the steps in order, computes nothing itself.

A pool of threads preprocesses items as they come (decoding, resizing and tokenizing release the GIL); one thread
drives the device, taking from the scheduler whatever waits each time the device is free. Every item has a future of
its own: it fails alone, and a request may span batches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedder.errors import EmbedderError, EngineFailed, Overloaded, ShuttingDown
from embedder.observer import Batch, Journey, Observer, begin_journey
from embedder.postprocess import Embedding, check_dimensions, finish_vector
from embedder.preprocess import ModelInput
from embedder.request import EmbeddingItem, Image, Text, Video
from embedder.scheduler import Scheduler
from embedder.settings import Settings

logger = logging.getLogger(__name__)

Preprocess = Callable[[EmbeddingItem], ModelInput]
RunBatch = Callable[[list[ModelInput]], NDArray[np.float32]]


@dataclass(frozen=True)
class _Job:
    item: EmbeddingItem
    model_input: ModelInput
    future: Future[Embedding]
    journey: Journey


class Engine:
    """Items in, futures of embeddings out.

    `preprocess` turns one item into a ModelInput, in many threads at once. `run_batch` turns the inputs of a batch
    into pooled rows, (num_items, hidden_size) float32, in one thread. `observer` is told what becomes of the items.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        run_batch: RunBatch,
        hidden_size: int,
        settings: Settings,
        observer: Observer | None = None,
    ) -> None:
        self.hidden_size = hidden_size
        self.settings = settings
        self._preprocess = preprocess
        self._run_batch = run_batch
        self._observer = observer or Observer()
        self._scheduler: Scheduler[_Job] = Scheduler(settings.max_batch_tokens)
        self._changed = threading.Condition()  # guards the scheduler, the token count and the flag
        self._pending_tokens = 0
        self._tokens_per_s = 1000.0
        self._is_closed = False
        self._is_drained = False  # nothing will be put into the scheduler any more
        self._pool = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="preprocess")
        self._thread = threading.Thread(target=self._drive_device, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending_tokens(self) -> int:
        """Estimated tokens of all items that were admitted and have no answer yet."""
        return self._pending_tokens

    def submit(self, item: EmbeddingItem, *, wait: bool = False) -> Future[Embedding]:
        """Admit one item. The future gives its Embedding or raises an `EmbedderError`; cancelling it frees the place.

        Raises at once: `UnsupportedDimensions`, `ShuttingDown`, and `Overloaded` where the queue is full, unless
        `wait`: then it blocks until there is room.
        """
        check_dimensions(item.dimensions, self.hidden_size)
        estimate = _estimated_tokens(item)
        self._admit(estimate, wait)
        future: Future[Embedding] = Future()
        future.add_done_callback(lambda _: self._release(estimate))
        journey = begin_journey(item, estimate)
        self._observer.admitted(journey)
        future.add_done_callback(lambda done: self._observer.answered(journey, done))
        try:
            self._pool.submit(self._prepare, item, future, journey)
        except RuntimeError as error:  # `close` came between
            future.cancel()
            raise ShuttingDown("the service is shutting down") from error
        return future

    def close(self) -> None:
        """Finish what was admitted, take nothing more, end the threads."""
        with self._changed:
            self._is_closed = True
        self._pool.shutdown(wait=True)
        with self._changed:
            self._is_drained = True
            self._changed.notify_all()
        self._thread.join()

    def _admit(self, tokens: int, wait: bool) -> None:
        def has_room() -> bool:
            return not self._pending_tokens or self._pending_tokens + tokens <= self.settings.max_queued_tokens

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: has_room() or self._is_closed)
            if self._is_closed:
                raise ShuttingDown("the service is shutting down")
            if not has_room():
                raise Overloaded(
                    f"{self._pending_tokens} tokens wait; allowed: up to {self.settings.max_queued_tokens}",
                    retry_after_s=max(1.0, self._pending_tokens / self._tokens_per_s),
                )
            self._pending_tokens += tokens

    def _release(self, tokens: int) -> None:
        with self._changed:
            self._pending_tokens -= tokens
            self._changed.notify_all()

    def _prepare(self, item: EmbeddingItem, future: Future[Embedding], journey: Journey) -> None:
        """One item's preprocessing, in a thread of the pool."""
        if future.cancelled():
            future.set_running_or_notify_cancel()  # whoever waits for several futures is told
            return
        try:
            with journey.preprocessing():
                model_input = self._preprocess(item)
        except EmbedderError as error:
            _fail(future, error)
        except Exception as error:
            logger.exception("preprocessing failed")
            _fail(future, _hidden(error))
        else:
            journey.count(model_input)
            with self._changed:
                self._scheduler.put(_Job(item, model_input, future, journey), model_input.cost, journey.admitted_s)
                self._changed.notify_all()
        finally:
            self._observer.preprocessed(journey)

    def _drive_device(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._scheduler) or self._is_drained)
                jobs = self._scheduler.take()
            if not jobs:
                return
            self._run([job for job in jobs if job.future.set_running_or_notify_cancel()])

    def _run(self, jobs: list[_Job]) -> None:
        """One batch. If it fails it is split, until whoever spoils it fails alone."""
        if not jobs:
            return
        start = time.monotonic()
        try:
            rows = self._run_batch([job.model_input for job in jobs])
            assert rows.shape == (len(jobs), self.hidden_size)
        except Exception as error:
            if len(jobs) == 1:
                logger.exception("the forward pass failed for one item of %d tokens", jobs[0].model_input.num_tokens)
                jobs[0].future.set_exception(_hidden(error))
                return
            logger.warning("a batch of %d items failed (%s); splitting it", len(jobs), type(error).__name__)
            middle = len(jobs) // 2
            self._run(jobs[:middle])
            self._run(jobs[middle:])
            return
        tokens = sum(job.model_input.cost for job in jobs)
        batch = Batch(len(jobs), tokens, start, time.monotonic())
        self._tokens_per_s += 0.2 * (tokens / max(batch.seconds, 1e-6) - self._tokens_per_s)
        for job, row in zip(jobs, rows, strict=True):
            job.journey.batch = batch
            _finish(job, row)
        self._observer.ran(batch, [job.journey for job in jobs])


def _finish(job: _Job, row: NDArray[np.float32]) -> None:
    try:
        vector = finish_vector(row, job.item.dimensions, job.item.normalize)
    except EngineFailed as error:
        logger.error("%s", error)
        job.future.set_exception(error)
    else:
        job.future.set_result(Embedding(vector, job.model_input.num_tokens, job.model_input.num_cut_tokens))


def _fail(future: Future[Embedding], error: EmbedderError) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _hidden(error: Exception) -> EngineFailed:
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
