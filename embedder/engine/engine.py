"""Owns the queue and the threads; calls the steps in order, computes nothing itself.

Threads preprocess items (decoding, resizing and tokenizing of long texts release the GIL); others do so with items that
have something to fetch first, so that a slow address holds up no text. A short text is tokenized by who brings it:
threads would only wait for the interpreter, and for longer than it takes. One thread drives the device, taking whatever
waits each time the device is free, or, where it computes by itself, one batch ahead. All take from a `Scheduler`, so
that a large request holds up others in no place. Every item has a future of its own: it fails alone, and a request may
span batches.
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from embedder.engine.cache import Twins, VectorCache, content_key
from embedder.engine.observer import Batch, ItemTrace, Observer, begin_trace
from embedder.engine.postprocess import Embedding, check_dimensions, finish_vectors
from embedder.engine.scheduler import Rate, Scheduler
from embedder.errors import (
    DeviceFailed,
    DeviceOutOfMemory,
    EmbedderError,
    EngineFailed,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
    without_traceback,
)
from embedder.inputs.address import has_url
from embedder.inputs.fetch import MAX_FETCHES, Fetcher
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.preprocess import ModelInput, is_short_text
from embedder.settings import Settings

logger = logging.getLogger(__name__)

Fetch = Callable[[EmbeddingItem, Callable[[], bool]], EmbeddingItem]
Preprocess = Callable[[EmbeddingItem], ModelInput]
WaitForRows = Callable[[], NDArray[np.float32]]
Launch = Callable[[list[ModelInput]], WaitForRows]

READY_BYTES = 2**29  # of preprocessed items without an answer: ten batches or so; then preprocessing waits
FITTING_BATCHES = 100  # without a full memory, after which larger ones are tried again

# Of preprocessing: a picture (300 tokens) is overtaken by texts that come up to 0.3 s later, and 1000 of those cost it
# about as long
SECONDS_PER_ESTIMATED_TOKEN = 0.001


@dataclass(eq=False)
class _Job:
    """One item on its way. `num_tokens` were admitted for it; `model_input` is there once it was preprocessed, and
    takes `num_bytes`.

    `key`: what the vector depends on, where vectors are cached; otherwise the job is like no other. `context`: of the
    request, for the log and for who listens to `trace`.
    """

    item: EmbeddingItem
    request: object
    num_tokens: int
    num_bytes: int = 0
    future: Future[Embedding] = field(default_factory=Future)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    trace: ItemTrace = field(init=False)
    model_input: ModelInput = field(init=False)
    key: Hashable = field(default_factory=object)

    def log(self, level: int, message: str, *values: object, error: BaseException | None = None) -> None:
        """A line in the name of the request."""
        # a copy: the context itself may still be entered by the thread that preprocessed the item
        self.context.copy().run(logger.log, level, message, *values, exc_info=error)


@dataclass
class Room:
    """Estimated tokens of the queue that are kept for a request, of which not all items have come yet."""

    num_tokens: int


@dataclass(frozen=True)
class _InFlightBatch:
    """A batch that was launched, and how to wait for its rows."""

    jobs: list[_Job]
    wait: WaitForRows
    started_s: float


class Engine:
    """Items in, futures of embeddings out.

    `preprocess` turns one item into a ModelInput, in many threads at once. `launch` starts a batch of inputs, and what
    it gives waits for their pooled rows, (num_items, hidden_size) float32; both run in one thread, and raise
    `DeviceOutOfMemory` where the batch does not fit, and `DeviceFailed` where the device is lost. In that case, where a
    batch takes longer than `stuck_after_s`, and after a bug of ours, whatever waits fails, `failure` says why, and
    `on_failure` is called with it, once.

    `max_in_flight` batches are launched before the first is waited for, if so many wait: 2 where `launch` returns while
    the device computes, which then computes without a break; 1 where `launch` itself computes.

    `fetch` puts bytes in the place of an item's URLs, or raises, soon once its second argument has turned true; by
    default as the settings say. `observer` is told what becomes of the items.

    With `settings.cache_bytes` rows are kept in `cache`, and equal items that wait together are computed once;
    `num_cache_hits` counts the items that were not computed.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        launch: Launch,
        hidden_size: int,
        settings: Settings,
        *,
        fetch: Fetch | None = None,
        observer: Observer | None = None,
        max_in_flight: int = 1,
        stuck_after_s: float = math.inf,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.hidden_size = hidden_size
        self.settings = settings
        self.failure: str | None = None
        self._fetch = fetch or Fetcher(settings)
        self._preprocess = preprocess
        self._launch = launch
        self._observer = observer or Observer()
        self._max_in_flight = max_in_flight
        self._stuck_after_s = stuck_after_s
        self._on_failure = on_failure
        self._lock = threading.RLock()  # guards all that follows
        self._has_fetches = threading.Condition(self._lock)
        self._has_items = threading.Condition(self._lock)
        self._has_inputs = threading.Condition(self._lock)
        self._has_room = threading.Condition(self._lock)
        self._fetches: Scheduler[_Job] = Scheduler(0, SECONDS_PER_ESTIMATED_TOKEN)  # to be fetched and preprocessed
        self._items: Scheduler[_Job] = Scheduler(0, SECONDS_PER_ESTIMATED_TOKEN)  # to be preprocessed, one at a time
        self._inputs: Scheduler[_Job] = Scheduler(settings.max_batch_tokens, 0.0002)
        self.cache = VectorCache(settings.cache_bytes)
        self.num_cache_hits = 0
        self._twins: Twins[_Job] = Twins()
        self._pending: set[_Job] = set()  # whoever takes a job out answers its future
        self._pending_tokens = 0
        self._ready_bytes = 0  # of the model inputs of those that are pending
        self._device_rate = Rate(self._inputs.seconds_per_token)
        self._answer_rate = Rate(0.001)
        self._answered_at_s = 0.0  # the last answer, or when there began to be something to answer
        self._in_flight: deque[_InFlightBatch] = (
            deque()
        )  # launched and not yet waited for; of the engine's thread alone
        self._batch_since_s = math.inf  # when the batch on the device began
        self._landed_s = 0.0  # when the last one ended
        self._num_fitting = 0  # batches since the last that did not fit the device's memory
        self._is_closed = False
        self._is_over = False
        self._threads: list[threading.Thread] = []
        self._start(settings.preprocess_threads, "preprocess", self._prepare_items, self._items, self._has_items)
        if settings.url_hosts:
            self._start(MAX_FETCHES, "fetch", self._prepare_items, self._fetches, self._has_fetches)
        self._start(1, "engine", self._drive_device)
        if stuck_after_s < math.inf:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _start(self, count: int, name: str, run: Callable[..., None], *arguments: object) -> None:
        for number in range(count):
            self._threads.append(threading.Thread(target=run, args=arguments, name=f"{name}-{number}", daemon=True))
            self._threads[-1].start()

    @property
    def pending_tokens(self) -> int:
        """Estimated tokens of all items without an answer, admitted or with room kept for them."""
        return self._pending_tokens

    def submit(
        self,
        item: EmbeddingItem,
        *,
        request: object = None,
        room: Room | None = None,
        wait: bool = False,
        wake: bool = True,
    ) -> Future[Embedding]:
        """Admit one item. The future gives its Embedding or raises an `EmbedderError`; cancelling it frees the place.

        Items with the same `request` (any hashable; None: the item is one of its own) share one place in the queues.
        Raises at once: `UnsupportedDimensions`, `ShuttingDown`, `DeviceFailed`, and `Overloaded` where the queue is
        full, unless it is one of those that `room` was made for, or `wait`: then it blocks until there is room.
        Without `wake`, a device that has nothing to do may sleep on until `wake` is called: with more items, at best.
        """
        check_dimensions(item.dimensions, self.hidden_size)
        job = _Job(item, object() if request is None else request, _estimated_tokens(item, self.settings))
        with self._lock:
            self._admit(job.num_tokens, room, wait)
            now_s = time.monotonic()
            if not self._pending:
                self._answered_at_s = now_s
            self._pending.add(job)
            job.trace = begin_trace(item, job.num_tokens)
            self._observer.admitted(job.trace)
            is_short = is_short_text(item)
            if not is_short:
                is_fetched = self.settings.url_hosts and has_url(item)
                (self._fetches if is_fetched else self._items).put(job, job.num_tokens, job.request, now_s)
                (self._has_fetches if is_fetched else self._has_items).notify()
        # the caller's future must not hold the item's pixels
        job.future.add_done_callback(partial(self._leave, weakref.ref(job), job.trace))
        if is_short:
            self._prepare(job, wake=wake)
        return job.future

    def wake(self) -> None:
        """See what has been submitted."""
        with self._lock:
            self._has_inputs.notify()

    @contextmanager
    def room_for(self, items: Sequence[EmbeddingItem]) -> Iterator[Room]:
        """Room in the queue for these items to be submitted one after the other: let in by halves they would be
        computed for nothing.

        Raises `RequestTooLarge` for items that would overfill even the empty queue, `Overloaded` if now they do.
        """
        num_tokens = sum(_estimated_tokens(item, self.settings) for item in items)
        most = self.settings.max_queued_tokens
        if len(items) > 1 and num_tokens > most:
            raise RequestTooLarge(f"the items are about {num_tokens} tokens; allowed: up to {most} in one request")
        with self._lock:
            if num_tokens and not self._has_room_for(num_tokens):
                raise self._overloaded()
            self._pending_tokens += num_tokens
        room = Room(num_tokens)
        try:
            yield room
        finally:
            with self._lock:
                self._pending_tokens -= room.num_tokens
                self._has_room.notify_all()

    def close(self) -> None:
        """Finish what was admitted, take nothing more, end the threads."""
        with self._lock:
            self._is_closed = True
            self.wake()  # for what was submitted without
            self._has_room.notify_all()
            self._has_room.wait_for(lambda: not self._pending)
            self._end()
        if not self.failure:  # a thread that failed may hang for ever
            for thread in self._threads:
                thread.join()

    def _end(self) -> None:
        self._is_closed = self._is_over = True
        for condition in (self._has_fetches, self._has_items, self._has_inputs, self._has_room):
            condition.notify_all()

    def _admit(self, num_tokens: int, room: Room | None, wait: bool) -> None:
        if wait:
            self._has_room.wait_for(lambda: self._has_room_for(num_tokens) or self._is_closed)
        if self.failure:
            raise _lost()
        if self._is_closed:
            raise ShuttingDown("the service is shutting down")
        if room:
            room.num_tokens -= num_tokens
        elif self._has_room_for(num_tokens):
            self._pending_tokens += num_tokens
        else:
            raise self._overloaded()

    def _has_room_for(self, num_tokens: int) -> bool:
        return not self._pending_tokens or self._pending_tokens + num_tokens <= self.settings.max_queued_tokens

    def _overloaded(self) -> Overloaded:
        wait_s = self._pending_tokens * self._answer_rate.seconds_per_token
        return Overloaded(
            f"{self._pending_tokens} tokens wait; allowed: up to {self.settings.max_queued_tokens}",
            # no longer than anybody waits for an answer; items that are given up make the rate look slow
            retry_after_s=max(1.0, min(wait_s, self.settings.request_timeout_s)),
        )

    def _answer(self, *outcomes: tuple[_Job, Embedding | EmbedderError | None]) -> None:
        """Free the jobs' places and answer them, once: of several answers the first counts. None: it was cancelled."""
        with self._lock:
            outcomes = tuple((job, outcome) for job, outcome in outcomes if job in self._pending)
            if not outcomes:
                return
            for job, _ in outcomes:
                self._take_out(job)
            now_s = time.monotonic()
            num_tokens = sum(job.num_tokens for job, outcome in outcomes if outcome)
            self._answer_rate.add(num_tokens, now_s - self._answered_at_s)
            self._answered_at_s = now_s
            self._has_room.notify_all()
        for job, outcome in outcomes:
            if not job.future.set_running_or_notify_cancel():
                continue
            if isinstance(outcome, Embedding):
                job.future.set_result(outcome)
            elif outcome:
                job.future.set_exception(without_traceback(outcome))

    def _take_out(self, job: _Job) -> None:
        self._pending.remove(job)
        self._pending_tokens -= job.num_tokens
        self._free(job.num_bytes)
        _ = any(queue.discard(job) for queue in (self._fetches, self._items, self._inputs))
        self._twins.remove(job.key, job)

    def _free(self, num_bytes: int) -> None:
        was_full = self._ready_bytes >= READY_BYTES
        self._ready_bytes -= num_bytes
        if was_full and self._ready_bytes < READY_BYTES:
            self._has_fetches.notify_all()
            self._has_items.notify_all()

    def _leave(self, reference: weakref.ref[_Job], trace: ItemTrace, future: Future[Embedding]) -> None:
        """A future is done: where that was the caller's doing, nobody waits for the job."""
        job = reference()
        if job and future.cancelled():
            self._answer((job, None))
        self._observer.answered(trace, future)

    def _prepare_items(self, queue: Scheduler[_Job], has_jobs: threading.Condition) -> None:
        """One of the threads that preprocess."""
        while job := self._next_item(queue, has_jobs):
            job.context.run(self._prepare, job)
            del job  # while it waits for the next

    def _next_item(self, queue: Scheduler[_Job], has_jobs: threading.Condition) -> _Job | None:
        """Waits for work, and for memory. None when it is over."""
        with self._lock:
            has_jobs.wait_for(lambda: (len(queue) and self._ready_bytes < READY_BYTES) or self._is_over)
            return next(iter(queue.take(time.monotonic())), None)

    def _prepare(self, job: _Job, *, wake: bool = True) -> None:
        try:
            with job.trace.preprocessing():
                job.model_input = self._preprocess(self._fetch(job.item, job.future.done))
                if self.settings.cache_bytes:
                    job.key = content_key(job.model_input)
        except EmbedderError as error:
            self._observer.preprocessed(job.trace)
            self._answer((job, error))
        except KeyboardInterrupt:  # of the program that brought a short text
            job.future.cancel()
            raise
        except BaseException:  # a panic in a library written in Rust is no Exception
            logger.exception("preprocessing failed")
            self._observer.preprocessed(job.trace)
            self._answer((job, _hidden()))
        else:
            job.trace.count(job.model_input)
            self._observer.preprocessed(job.trace)
            self._put_input(job, wake=wake)

    def _put_input(self, job: _Job, *, wake: bool) -> None:
        with self._lock:
            if job not in self._pending:  # given up in the meantime
                return
            job.num_bytes = job.model_input.num_bytes
            self._ready_bytes += job.num_bytes
            row = self.cache.get(job.key)
            if row is None:
                if self._twins.add(job.key, job):
                    self._inputs.put(job, job.model_input.cost, job.request, time.monotonic())
                    if wake:
                        self._has_inputs.notify()
                return
            self.num_cache_hits += 1
        self._answer_rows([job], row[None], is_cached=True)

    def _drive_device(self) -> None:
        try:
            while self._launch_next() or self._land_next():
                pass
        except DeviceFailed as error:
            self._give_up(f"the device failed: {error}")
        except BaseException:
            logger.exception("a bug ended the engine's thread")
            self._give_up("a bug ended the engine's thread")

    def _launch_next(self) -> bool:
        """Launch the next batch. False: nothing waits, or enough is launched."""
        jobs = self._next_batch() if len(self._in_flight) < self._max_in_flight else []
        if jobs:
            self._in_flight.append(self._start_flight(jobs))
        return bool(jobs)

    def _land_next(self) -> bool:
        """Answer the batch that was launched first. False: there is none, for it is all over."""
        if self._in_flight:
            self._land(self._in_flight.popleft())
            return True
        return False

    def _next_batch(self) -> list[_Job]:
        """What is still wanted of it; while nothing is launched, waits for work. Empty: nothing waits."""
        with self._lock:
            while True:
                if not self._in_flight:
                    self._has_inputs.wait_for(lambda: len(self._inputs) or self._is_over)
                taken = self._inputs.take(time.monotonic())
                jobs = self._wanted([job for job in taken if self._twins.start(job.key, job)])
                if jobs or not taken:
                    return jobs

    def _wanted(self, jobs: list[_Job]) -> list[_Job]:
        """Without those that were given up, unless somebody else waits for the same content."""
        with self._lock:
            wanted = [job for job in jobs if job in self._pending or self._twins.is_awaited(job.key)]
            for job in set(jobs) - set(wanted):
                self._twins.finish(job.key)
            return wanted

    def _start_flight(self, jobs: list[_Job]) -> _InFlightBatch:
        start_s = time.monotonic()
        self._batch_since_s = min(self._batch_since_s, start_s)
        try:
            wait = self._launch([job.model_input for job in jobs])
        except Exception as error:
            return _InFlightBatch(jobs, partial(_raise, error), start_s)  # in its turn
        return _InFlightBatch(jobs, wait, start_s)

    def _land(self, flight: _InFlightBatch) -> None:
        """Answer a batch. If it failed it is split, until whoever spoils it fails alone."""
        jobs = flight.jobs
        try:
            rows, batch = self._timed_rows(flight)
        except DeviceFailed:
            raise
        except Exception as error:
            del flight  # which holds the error, as the error holds this frame
            traceback.clear_frames(error.__traceback__)  # or what they hold would be there while the halves run
            if len(jobs) == 1:
                text = "the forward pass failed for one item of %d tokens"
                jobs[0].log(logging.ERROR, text, jobs[0].model_input.num_tokens, error=error)
                with self._lock:
                    twins = self._twins.finish(jobs[0].key)
                self._answer(*((job, _of_one_item(error, job)) for job in (jobs[0], *twins)))
                return
            logger.warning("a batch of %d items failed (%s); splitting it", len(jobs), type(error).__name__)
            if isinstance(error, DeviceOutOfMemory):
                self._shrink_batches(jobs)
        else:
            for job in jobs:
                job.trace.batch = batch
            self._finish(jobs, rows)
            self._observer.ran(batch, [job.trace for job in jobs])
            self._grow_batches()
            return
        middle = len(jobs) // 2
        for half in (jobs[:middle], jobs[middle:]):
            if wanted := self._wanted(half):
                self._land(self._start_flight(wanted))

    def _timed_rows(self, flight: _InFlightBatch) -> tuple[NDArray[np.float32], Batch]:
        try:
            rows = flight.wait()
        finally:
            end_s = time.monotonic()
            start_s, self._landed_s = max(flight.started_s, self._landed_s), end_s
            self._batch_since_s = end_s if self._in_flight else math.inf
        jobs = flight.jobs
        assert rows.shape == (len(jobs), self.hidden_size)
        batch = Batch(len(jobs), sum(job.model_input.cost for job in jobs), start_s, end_s)
        self._device_rate.add(batch.num_tokens, batch.seconds)
        self._inputs.seconds_per_token = self._device_rate.seconds_per_token
        return rows, batch

    def _shrink_batches(self, jobs: list[_Job]) -> None:
        """After a batch that did not fit: somebody else has the memory, perhaps for a moment only."""
        limit = sum(job.model_input.cost for job in jobs) // 2
        self._num_fitting = 0
        if limit < self._inputs.max_batch_tokens:
            self._inputs.max_batch_tokens = limit
            logger.warning("the device's memory is full: batches have at most %d tokens for now", limit)

    def _grow_batches(self) -> None:
        """After a batch that did fit: once many have, twice as large ones are tried, up to what the settings say."""
        self._num_fitting += 1
        limit = self._inputs.max_batch_tokens
        if limit < self.settings.max_batch_tokens and self._num_fitting >= FITTING_BATCHES:
            self._num_fitting = 0
            self._inputs.max_batch_tokens = min(2 * limit, self.settings.max_batch_tokens)
            logger.info("batches may have %d tokens again", self._inputs.max_batch_tokens)

    def _finish(self, jobs: list[_Job], rows: NDArray[np.float32]) -> None:
        twins: list[_Job] = []
        places = []
        with self._lock:
            for place, (job, row) in enumerate(zip(jobs, rows, strict=True)):
                self.cache.put(job.key, row)
                of_job = self._twins.finish(job.key)
                twins += of_job
                places += [place] * len(of_job)
            self.num_cache_hits += len(twins)
        self._answer_rows(jobs, rows, is_cached=False)
        if twins:
            self._answer_rows(twins, rows[places], is_cached=True)

    def _answer_rows(self, jobs: list[_Job], rows: NDArray[np.float32], *, is_cached: bool) -> None:
        """`rows`: (len(jobs), hidden_size)."""
        outcomes: list[tuple[_Job, Embedding | EngineFailed]] = []
        vectors = finish_vectors(rows, [(job.item.dimensions, job.item.normalize) for job in jobs])
        for job, vector in zip(jobs, vectors, strict=True):
            if isinstance(vector, EngineFailed):
                job.log(logging.ERROR, "%s", vector)
                outcomes.append((job, vector))
            else:
                size = job.model_input
                outcomes.append((job, Embedding(vector, size.num_tokens, size.num_cut_tokens, is_cached)))
        self._answer(*outcomes)

    def _watch(self) -> None:
        """A batch that takes too long will not end: the thread that waits for it is given up."""
        while not self._is_over:
            since_s = self._batch_since_s
            if time.monotonic() - since_s > self._stuck_after_s:
                self._give_up(f"the device did not finish a batch within {self._stuck_after_s:g} s")
            time.sleep(min(1.0, self._stuck_after_s / 4))

    def _give_up(self, reason: str) -> None:
        """Nothing more will be embedded: everybody who waits is told."""
        with self._lock:
            if self.failure:
                return
            self.failure = reason
            jobs = list(self._pending)
            self._end()
        logger.critical("the engine gives up with %d items waiting: %s", len(jobs), reason)
        self._answer(*((job, _lost()) for job in jobs))
        if self._on_failure:
            self._on_failure(reason)


def _raise(error: Exception) -> NoReturn:
    raise error


def _of_one_item(error: Exception, job: _Job) -> EngineFailed:
    """What the caller may know."""
    if isinstance(error, DeviceOutOfMemory):
        num_tokens = job.model_input.num_tokens
        return DeviceOutOfMemory(f"an item of {num_tokens} tokens does not fit the device's memory, even alone")
    return _hidden()


def _lost() -> DeviceFailed:
    return DeviceFailed("the service cannot embed any more and ends; its log has the reason")


def _hidden() -> EngineFailed:
    """What a caller may know of an error that is ours."""
    return EngineFailed("the item could not be embedded; the service's log has the reason")


def _estimated_tokens(item: EmbeddingItem, settings: Settings) -> int:
    """A guess at admission, before anything is decoded: four characters a token, 300 tokens a picture or frame.

    Never more than what an item is cut to.
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
    return min(estimate, settings.max_input_tokens)
