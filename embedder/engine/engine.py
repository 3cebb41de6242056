"""The way of an item through the engine: admitted, preprocessed, scheduled, computed, resolved.

Worker threads preprocess; one device thread launches batches. Both take jobs from a `Scheduler`, so a large request
blocks no other at either stage. Each item has its own future: it fails by itself, and a request may span batches.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from embedder.engine.admission import Admission, Reservation, check_item, estimate_request_tokens, estimate_tokens
from embedder.engine.batch_limits import BatchLimit
from embedder.engine.callers import CALLER
from embedder.engine.coalescing import CoalescingCache
from embedder.engine.device import BatchAbandoned, Device, InFlightBatch, Launch, Rows
from embedder.engine.hang_watch import HangWatch
from embedder.engine.job import Job, device_failed, item_failed
from embedder.engine.observer import ItemOutcome, ItemTrace, Observer, begin_trace
from embedder.engine.postprocess import Embedding, finish_vectors
from embedder.engine.preprocess_workers import Fetch, Preprocess, PreprocessWorkers
from embedder.engine.scheduler import NO_DELAY, ON_CPU, BatchLength, Scheduler
from embedder.engine.starter import Starter
from embedder.errors import DeviceFailed, DeviceOutOfMemory, EmbedderError, ShuttingDown, counted, without_traceback
from embedder.inputs.fetch import Fetcher
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.pairs import Query, is_short
from embedder.settings import Settings

logger = logging.getLogger(__name__)


class Engine:
    """Turns items into futures of their embeddings.

    `preprocess` turns an item into a ModelInput, in many threads at once. `launch` starts a batch of ModelInputs and
    returns a function that waits for one float32 row for each: (hidden_size,), or (1,) for a pair. Both functions run
    in one thread and may raise `DeviceOutOfMemory` or `DeviceFailed`.

    `max_in_flight` batches are launched before the first is waited for: 2 if `launch` returns while the device
    computes, so that the device is never idle; 1 if `launch` itself computes.

    `fetch(item, is_cancelled)` replaces an item's URLs by bytes, and may raise once `is_cancelled()` is true; the
    default is a `Fetcher` of the settings. `observer` is called at each stage of an item.
    With `settings.cache_bytes` rows are kept, and equal items that wait at the same time are computed once.

    After `DeviceFailed`, a hanging batch or thread, or an unexpected error, all pending items fail, `failure` is the
    reason, and `on_failure` is called with it once.
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
        batch_length: BatchLength = ON_CPU,
        stuck_after_s: float = math.inf,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.hidden_size = hidden_size
        self.settings = settings
        self.failure: str | None = None
        self._observer = observer or Observer()
        self._max_in_flight = max_in_flight
        self._on_failure = on_failure
        self._watch = HangWatch(self._fail)
        # Only the device thread uses these:
        watched = partial(self._watch.step, "the device did not finish a batch", stuck_after_s)
        self._device = Device(launch, self._is_wanted, watched)
        self.stop_if_abandoned = self._device.stop_if_abandoned  # for a `launch` that computes
        self._batch_limit = BatchLimit(settings.max_batch_tokens)
        self._in_flight: deque[InFlightBatch] = deque()
        # The lock guards these. A caller that submits or cancels many items takes the lock once:
        self.lock = threading.RLock()  # each acquisition may wait for a holder that waits for the GIL
        self._has_inputs = threading.Condition(self.lock)
        self._has_capacity = threading.Condition(self.lock)  # also notified when the last item leaves
        self._admission = Admission(settings)
        self._pending: set[Job] = set()  # admitted and not resolved
        self._admitted: list[ItemTrace] = []  # that the observer does not know yet
        self._workers = PreprocessWorkers(
            self.lock,
            settings,
            fetch or Fetcher(settings),
            preprocess,
            self._observer.decoder_ended,
            schedule=self._schedule,
            fail=lambda job, error: self._resolve((job, error)),
            watch=self._watch,
            on_failure=self._fail,
        )
        self._cache: CoalescingCache[Job] = CoalescingCache(settings.cache_bytes)
        self._inputs = Scheduler[Job](settings.max_batch_tokens, self._device.seconds_per_token, batch_length)
        self.starter = Starter(self.wake)  # of an event loop that submits without `wake`
        self._is_awake = False  # the device may take inputs; until there are none left
        self._is_closed = False  # to new items
        self._is_over = False  # for the threads
        self._device_thread = threading.Thread(target=self._run_device, name="engine", daemon=True)
        self._device_thread.start()

    @property
    def pending_tokens(self) -> int:
        """Estimated tokens of all items that are not resolved, and of all reservations."""
        return self._admission.pending_tokens

    # Submitting

    def submit(
        self,
        item: EmbeddingItem,
        *,
        request: object = None,
        reservation: Reservation | None = None,
        wait: bool = False,
        wake: bool = True,
    ) -> Future[Embedding]:
        """Admit one item. The future gives its Embedding or raises an `EmbedderError`; cancelling it drops the item.
        That of a `Query` gives its ModelInput, for the pairs of its request.

        Items with the same `request` (any hashable) share a queue in the scheduler; with None the item has its own.
        Raises `UnsupportedDimensions`, `InputTooLong`, `ShuttingDown`, `DeviceFailed`, and `Overloaded` if the queue is
        full. `wait`, which blocks until there is capacity, or a `reservation`, whose priority it has, avoids the last.
        Without `wake` an idle device starts only after `wake()`, so that more items run together.
        """
        check_item(item, self.settings, self.hidden_size)
        job = Job(item, request, estimate_tokens(item, self.settings), reservation.delay if reservation else NO_DELAY)
        is_inline = is_short(item)
        with self.lock:
            now_s = self._admit(job, reservation, wait)
            self._pending.add(job)
            job.trace = begin_trace(item, job.num_tokens)
            self._admitted.append(job.trace)
            if not is_inline:
                self._workers.put(job, now_s)
            if wake:
                self._report_admitted()
        # The callback has no reference to the job: the caller's future must not hold the item's pixels.
        job.future.add_done_callback(partial(self._on_future_done, weakref.ref(job)))
        if is_inline:  # tokenizing takes less time here than handing the job to another thread
            self._workers.preprocess_short(job, wake=wake)
        return job.future

    def wake(self) -> None:
        """Start computing what was submitted without `wake`."""
        with self.lock:
            self._report_admitted()
            self._is_awake = True
            self._has_inputs.notify()

    def _report_admitted(self) -> None:
        if self._admitted:
            self._observer.admitted(self._admitted)
            self._admitted = []

    @contextmanager
    def reserve(self, items: Sequence[EmbeddingItem], priority: int = 0) -> Iterator[Reservation]:
        """Reserve capacity for a request of this `priority`, so that it is not refused after some items were computed.

        Raises `RequestTooLarge` if the items exceed even an empty queue, `Overloaded` if they do not fit now.
        """
        num_tokens = estimate_request_tokens(items, self.settings)
        with self.lock:
            reservation = self._admission.reserve(num_tokens, time.monotonic(), priority, CALLER.get())
        try:
            yield reservation
        finally:
            with self.lock:
                self._admission.release_reservation(reservation)
                self._has_capacity.notify_all()

    def close(self) -> None:
        """Refuse new items, finish the pending ones, and end the threads."""
        with self.lock:
            self._is_closed = True
            self.wake()
            self._has_capacity.notify_all()
            self._has_capacity.wait_for(lambda: not self._pending)
            self._end_threads()
        if not self.failure:  # after a failure a thread may hang forever
            self._workers.join(self._device_thread)

    def _admit(self, job: Job, reservation: Reservation | None, wait: bool) -> float:
        """Count the item in, and return the time."""
        if wait:
            has_capacity = partial(self._admission.has_capacity, job.num_tokens, caller=job.caller)
            self._has_capacity.wait_for(lambda: has_capacity() or self._is_closed)
        if self.failure:
            raise device_failed()
        if self._is_closed:
            raise ShuttingDown("the service is shutting down")
        now_s = time.monotonic()
        self._admission.admit(job.num_tokens, reservation, now_s, job.caller)
        return now_s

    # Computing, in the device thread

    def _schedule(self, job: Job, wake: bool) -> None:
        """Queue a preprocessed job for the device, unless its row is cached or being computed."""
        if isinstance(job.item, Query):  # the pairs of its request will have its tokens
            return self._resolve((job, job.model_input))
        with self.lock:
            if job not in self._pending:  # cancelled during preprocessing
                return None
            job.num_bytes = job.model_input.num_bytes
            self._workers.add_ready_bytes(job.num_bytes)
            row = self._cache.find_row(job.key)
            if row is None:
                if self._cache.add_waiting(job.key, job):
                    self._inputs.put(job, job.model_input.cost, job.request, time.monotonic(), job.delay, job.caller)
                    if wake:
                        self.wake()
                return None
        return self._resolve_rows([job], [row], is_cached=True)

    def _run_device(self) -> None:
        try:
            # No local variable refers to a job: it would keep its pixels while this frame waits for the next one.
            while self._launch_next_batch() or self._finish_next_batch():
                pass
        except DeviceFailed as error:
            self._fail(f"the device failed: {error}")
        except BaseException:
            logger.exception("the device thread ended with an unexpected error")
            self._fail("the device thread ended with an unexpected error")

    def _launch_next_batch(self) -> bool:
        """Launch a batch. False if no job waits or `max_in_flight` batches are launched."""
        jobs = self._take_batch() if len(self._in_flight) < self._max_in_flight else []
        if jobs:
            self._in_flight.append(self._device.launch(jobs))
        return bool(jobs)

    def _finish_next_batch(self) -> bool:
        """Wait for the oldest batch and resolve its jobs. False if there is none: the engine is closed."""
        if not self._in_flight:
            return False
        self._finish_batch(self._in_flight.popleft())
        return True

    def _take_batch(self) -> list[Job]:
        """The jobs of the next batch. If no batch is in flight, waits for one; otherwise it may be empty."""
        with self.lock:
            while True:
                if not self._in_flight:
                    self._has_inputs.wait_for(lambda: (self._is_awake and len(self._inputs)) or self._is_over)
                self._inputs.max_batch_tokens = self._batch_limit.max_tokens
                taken = self._inputs.take(time.monotonic()) if self._is_awake else []
                self._is_awake &= len(self._inputs) > 0
                jobs = self._still_wanted([job for job in taken if self._cache.start_computing(job.key, job)])
                if jobs or not taken:
                    return jobs

    def _is_wanted(self, job: Job) -> bool:
        """Whether the job was not cancelled, or another job with the same content waits for its row."""
        return job in self._pending or self._cache.is_awaited(job.key)

    def _still_wanted(self, jobs: list[Job]) -> list[Job]:
        """The wanted jobs. The others are no longer being computed."""
        with self.lock:
            wanted = list(filter(self._is_wanted, jobs))
            for job in set(jobs) - set(wanted):
                self._cache.stop_computing(job.key)
            return wanted

    def _finish_batch(self, in_flight: InFlightBatch) -> None:
        """Wait for a batch and resolve its jobs. If it failed, run its halves, until the faulty item runs by itself."""
        jobs = in_flight.jobs
        try:
            rows, batch = self._device.wait(in_flight)
        except DeviceFailed:
            raise
        except Exception as error:
            del in_flight  # it may hold the error, whose traceback holds this frame
            traceback.clear_frames(error.__traceback__)  # frees the memory of the batch before others run
            if isinstance(error, BatchAbandoned):
                parts = [jobs]  # an item may have become wanted again by an equal one
            elif len(jobs) == 1:
                self._fail_item(jobs[0], error)
                return
            else:
                name = type(error).__name__
                logger.warning("a batch of %d items failed (%s); repeating it in halves", len(jobs), name)
                if isinstance(error, DeviceOutOfMemory):
                    self._batch_limit.shrink(sum(job.model_input.cost for job in jobs))
                parts = [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]
        else:
            for job in jobs:
                job.trace.batch = batch
            self._resolve_batch(jobs, rows)
            self._observer.ran(batch, [job.trace for job in jobs])
            self._batch_limit.grow()
            self._inputs.seconds_per_token = self._device.seconds_per_token
            return
        for part in parts:
            if wanted := self._still_wanted(part):
                self._finish_batch(self._device.launch(wanted))

    # Resolving

    def _resolve_batch(self, jobs: list[Job], rows: Rows) -> None:
        """Resolve the jobs of a batch, and the jobs that were coalesced with them."""
        with self.lock:
            served = [
                (one, row) for job, row in zip(jobs, rows, strict=True) for one in self._cache.store_row(job.key, row)
            ]
        self._resolve_rows(jobs, rows, is_cached=False)
        if served:
            self._resolve_rows([one for one, _ in served], [row for _, row in served], is_cached=True)

    def _resolve_rows(self, jobs: list[Job], rows: Rows, *, is_cached: bool) -> None:
        """Resolve each job with its row."""
        outcomes: list[tuple[Job, Embedding | EmbedderError]] = []
        vectors = finish_vectors(rows, [(job.item.dimensions, job.item.normalize) for job in jobs])
        for job, vector in zip(jobs, vectors, strict=True):
            if isinstance(vector, EmbedderError):
                job.log_error(logger, "%s", vector)
                outcomes.append((job, vector))
            else:
                outcomes.append((job, Embedding(vector, *job.model_input.sizes(), is_cached)))
        self._resolve(*outcomes)

    def _fail_item(self, job: Job, error: Exception) -> None:
        """Resolve the job that makes its batch fail, and those coalesced with it."""
        num_tokens = job.model_input.num_tokens
        job.log_error(logger, "the forward pass failed for one item of %d tokens", num_tokens, exc=error)
        with self.lock:
            coalesced = self._cache.stop_computing(job.key)
        self._resolve(*((one, item_failed(error, num_tokens)) for one in (job, *coalesced)))

    def _resolve(self, *outcomes: tuple[Job, ItemOutcome]) -> None:
        """Release the jobs' capacity and complete their futures. None is the outcome of a cancelled future.

        Only the first outcome of a job counts.
        """
        with self.lock:
            outcomes = tuple((job, outcome) for job, outcome in outcomes if job in self._pending)
            if not outcomes:
                return
            for job, _ in outcomes:
                self._forget(job)
            self._admission.release(
                [(job.caller, job.num_tokens) for job, _ in outcomes],
                num_cancelled_tokens=sum([job.num_tokens for job, outcome in outcomes if outcome is None]),
                now_s=time.monotonic(),
            )
            self._has_capacity.notify_all()
        self._observer.resolved([(job.trace, outcome) for job, outcome in outcomes])
        for job, outcome in outcomes:
            if not job.future.set_running_or_notify_cancel():
                continue
            if isinstance(outcome, EmbedderError):
                job.future.set_exception(without_traceback(outcome))
            elif outcome:
                job.future.set_result(outcome)

    def _forget(self, job: Job) -> None:
        """Remove a job from every queue that it may be in."""
        self._pending.remove(job)
        self._workers.release_ready_bytes(job.num_bytes)
        _ = self._inputs.discard(job) or self._workers.discard(job)
        self._cache.remove_waiting(job.key, job)

    def _on_future_done(self, job_ref: weakref.ref[Job], future: Future[Embedding]) -> None:
        if future.cancelled() and (job := job_ref()):
            self._resolve((job, None))

    # Failing

    def _fail(self, reason: str) -> None:
        """Stop the engine permanently: fail all pending items and refuse new ones."""
        with self.lock:
            if self.failure:
                return
            self.failure = reason
            jobs = list(self._pending)
            self._end_threads()
        logger.critical("the engine stops with %s pending: %s", counted(len(jobs), "item"), reason)
        self._resolve(*((job, device_failed()) for job in jobs))
        if self._on_failure:
            self._on_failure(reason)

    def _end_threads(self) -> None:
        self._is_closed = self._is_over = True
        self._watch.close()
        self._workers.close()
        self._has_inputs.notify_all()
        self._has_capacity.notify_all()
