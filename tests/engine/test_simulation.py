"""Both queues of the engine under heavy traffic, in virtual time: the real scheduler, with simulated threads.

Queries arrive at random, images in bursts of 20, and one client sends 10,000 texts in a single request. The device
takes 10 us per token and 1 ms per batch, a thread 0.3 ms for a text and 15 ms for an image.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from embedder.engine.preprocess_workers import SECONDS_PER_ESTIMATED_TOKEN
from embedder.engine.scheduler import STRETCH, Scheduler

SECONDS_PER_TOKEN, SECONDS_PER_BATCH = 10e-6, 1e-3
MAX_BATCH_TOKENS, NUM_THREADS = 16384, 4
BATCH_S = MAX_BATCH_TOKENS * SECONDS_PER_TOKEN  # 0.164
BURST_S = 20 * 2600 * SECONDS_PER_TOKEN  # 0.52
BULK_AT_S = 2.0


@dataclass(eq=False)
class Job:
    kind: str
    request: object
    arrival_s: float
    estimate: int  # tokens, before it is preprocessed
    cost: int  # tokens
    preprocess_s: float
    done_s: float = 0.0

    @property
    def wait_s(self) -> float:
        return self.done_s - self.arrival_s


class Fifo:
    """First in, first out, with the interface of `Scheduler`."""

    def __init__(self, max_batch_tokens: int, _: float) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[tuple[Job, int]] = deque()

    def __len__(self) -> int:
        return len(self.waiting)

    def put(self, job: Job, cost: int, *_: object) -> None:
        self.waiting.append((job, cost))

    def take(self, _: float) -> list[Job]:
        jobs: list[Job] = []
        budget = self.max_batch_tokens
        while self.waiting and (not jobs or self.waiting[0][1] <= budget):
            job, cost = self.waiting.popleft()
            budget -= cost
            jobs.append(job)
        return jobs


def traffic(seconds: float) -> Iterator[Job]:
    generator = random.Random(0)
    now_s = 0.0
    while (now_s := now_s + generator.expovariate(100)) < seconds:
        tokens = 20 + int(generator.lognormvariate(2.5, 0.8))
        yield Job("query", object(), now_s, tokens, tokens, 0.3e-3)
    for start_s, _ in itertools.product(np.arange(0.5, seconds, 2.0), range(20)):
        yield Job("image", object(), start_s, 300, 2600, 15e-3)
    for _ in range(10_000):
        yield Job("bulk", "bulk", BULK_AT_S, 100, 100, 0.3e-3)


def simulate(queue: Any) -> tuple[dict[str, list[Job]], float]:
    """The finished jobs by kind, and the share of time in which the device computes while the bulk request is there."""
    jobs = list(traffic(20.0))
    items, inputs = queue(0, SECONDS_PER_ESTIMATED_TOKEN), queue(MAX_BATCH_TOKENS, SECONDS_PER_TOKEN)
    numbers = itertools.count()
    events: list[tuple[float, int, str, Any]] = [(job.arrival_s, next(numbers), "arrival", job) for job in jobs]
    heapq.heapify(events)
    num_free_threads, is_device_free = NUM_THREADS, True
    computing: list[tuple[float, float]] = []  # start and end of each batch
    while events:
        now_s, _, event, subject = heapq.heappop(events)
        if event == "arrival":
            items.put(subject, subject.estimate, subject.request, now_s)
        elif event == "preprocessed":
            inputs.put(subject, subject.cost, subject.request, now_s)
            num_free_threads += 1
        else:
            is_device_free = True
            for job in subject:
                job.done_s = now_s
        while num_free_threads and len(items):
            (job,) = items.take(now_s)
            num_free_threads -= 1
            heapq.heappush(events, (now_s + job.preprocess_s, next(numbers), "preprocessed", job))
        if is_device_free and len(inputs):
            is_device_free = False
            batch = inputs.take(now_s)
            end_s = now_s + SECONDS_PER_BATCH + sum(job.cost for job in batch) * SECONDS_PER_TOKEN
            computing.append((now_s + SECONDS_PER_BATCH, end_s))
            heapq.heappush(events, (end_s, next(numbers), "embedded", batch))
    by_kind = {kind: [job for job in jobs if job.kind == kind] for kind in ("query", "image", "bulk")}
    bulk_done_s = max(job.done_s for job in by_kind["bulk"])
    busy_s = sum(max(0.0, min(end_s, bulk_done_s) - max(start_s, BULK_AT_S)) for start_s, end_s in computing)
    return by_kind, busy_s / (bulk_done_s - BULK_AT_S)


@pytest.fixture(scope="module")
def fair() -> tuple[dict[str, list[Job]], float]:
    return simulate(Scheduler)


@pytest.fixture(scope="module")
def fifo() -> tuple[dict[str, list[Job]], float]:
    return simulate(Fifo)


def waits_s(result: tuple[dict[str, list[Job]], float], kind: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([job.wait_s for job in result[0][kind]])


def test_query_waits_for_two_batches_and_the_images_that_have_aged(fair: Any, fifo: Any) -> None:
    """The two are the batch on the device and the query's own. An image ages for `STRETCH` times its duration.

    First in, first out makes the query wait for seconds, until the bulk request has run.
    """
    fair_s, fifo_s = waits_s(fair, "query"), waits_s(fifo, "query")
    assert fair_s.max() < 2 * BATCH_S + BURST_S - STRETCH * 2600 * SECONDS_PER_TOKEN  # 0.64
    assert np.median(fair_s) < 1.5 * BATCH_S
    assert fifo_s.max() > 8
    assert np.median(fifo_s) > 3


def test_no_request_starves(fair: Any) -> None:
    """The bulk request gets the time that the others leave, and images get at least half of the device."""
    assert waits_s(fair, "image").max() < 2 * BURST_S + 2 * BATCH_S
    others_s = sum(job.cost for kind in ("query", "image") for job in fair[0][kind]) * SECONDS_PER_TOKEN
    bulk_s = sum(job.cost for job in fair[0]["bulk"]) * SECONDS_PER_TOKEN
    assert waits_s(fair, "bulk").max() < 1.05 * bulk_s / (1 - others_s / 20.0)
    assert all(job.done_s > 0 for jobs in fair[0].values() for job in jobs)


def test_device_is_never_idle_while_jobs_wait(fair: Any) -> None:
    assert fair[1] >= 0.99
