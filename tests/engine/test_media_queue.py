"""Which item a process decodes next: small ones pass large ones, memory is bounded, and nobody waits forever."""

from __future__ import annotations

import random

import pytest

from embedder.engine.job import Job
from embedder.engine.media_queue import MediaQueue
from embedder.inputs.decoder_process import START_BYTES
from tests.fake_model import item

LARGE = 1000 * 2**20
BUDGET = 2 * LARGE + 1


def job(request: object = None) -> Job:
    return Job(item("clip"), request or object(), 300)


def queue(num_processes: int = 4) -> MediaQueue:
    return MediaQueue(num_processes, 0.001, BUDGET)


def put(media: MediaQueue, *sizes: int) -> list[Job]:
    jobs = [job() for _ in sizes]
    for one, size in zip(jobs, sizes, strict=True):
        media.put(one, size, 0.0)
    return jobs


def test_small_item_passes_large_ones_that_wait_for_memory() -> None:
    media = queue()
    large = put(media, *[LARGE] * 12)
    assert [media.take(process, 0.0) for process in (0, 1)] == [(large[0], LARGE), (large[1], LARGE)]
    assert media.take(2, 0.0) is None  # no memory for a third
    (small,) = put(media, 0)
    assert media.take(2, 0.0) == (small, START_BYTES)
    assert len(media) == 10


def test_last_process_is_kept_for_small_items() -> None:
    media = queue(3)
    put(media, 3 * START_BYTES)
    assert media.take(2, 0.0) is None
    (small,) = put(media, START_BYTES)
    assert media.take(2, 0.0) == (small, START_BYTES)


def test_first_process_prefers_large_items_so_that_small_ones_do_not_starve_them() -> None:
    media = queue()
    put(media, *[0] * 100)
    (large,) = put(media, LARGE)
    assert media.take(0, 0.0) == (large, LARGE)


def test_item_larger_than_the_budget_is_decoded_when_no_other_large_one_is() -> None:
    media = queue()
    first, huge = put(media, LARGE, 3 * BUDGET)
    assert media.take(0, 0.0) == (first, LARGE)
    assert media.take(1, 0.0) is None
    media.release(first)
    assert media.take(1, 0.0) == (huge, 3 * BUDGET)
    (small,) = put(media, 0)
    assert media.take(0, 0.0) == (small, START_BYTES)


def test_item_that_turns_out_to_be_large_gets_memory_or_waits_for_it() -> None:
    media = queue()
    first, second, third = put(media, 0, 0, 0)
    assert [media.take(process, 0.0) for process in (0, 1, 3)] == [(one, START_BYTES) for one in (first, second, third)]
    assert media.grow(first, 0, LARGE)
    assert not media.grow(second, 1, 2 * LARGE)  # no memory
    assert not media.grow(third, 3, LARGE)  # the process for small ones
    media.put(second, 2 * LARGE, 0.0)
    assert media.take(1, 0.0) is None
    media.release(first)
    assert media.take(1, 0.0) == (second, 2 * LARGE)


def test_discarded_item_is_not_taken() -> None:
    media = queue()
    jobs = put(media, LARGE, LARGE, LARGE, 0, LARGE)
    assert media.take(0, 0.0)
    assert media.take(0, 0.0)
    assert media.take(0, 0.0) == (jobs[3], START_BYTES)  # the third large one waits for memory
    assert media.discard(jobs[2])
    assert not media.discard(jobs[2])
    assert media.discard(jobs[4])
    assert not media.discard(jobs[0])  # it is being decoded
    assert len(media) == 0


@pytest.mark.parametrize("seed", range(20))
def test_memory_is_bounded_and_every_item_is_decoded(seed: int) -> None:
    chooser = random.Random(seed)
    media = queue(chooser.randint(2, 5))
    waiting = {one for _ in range(60) for one in put(media, chooser.choice([0, 0, LARGE // 2, LARGE, 2 * BUDGET]))}
    running: dict[int, tuple[Job, int]] = {}
    now_s = 0.0
    while waiting or running:
        now_s += 0.1
        assert now_s < 100
        process = chooser.randrange(media.num_processes)
        if process in running:
            done, _ = running.pop(process)
            media.release(done)
        elif taken := media.take(process, now_s):
            if taken[1] <= START_BYTES and chooser.random() < 0.3 and not media.grow(taken[0], process, LARGE):
                media.put(taken[0], LARGE, now_s)
                continue
            running[process] = taken
            waiting.discard(taken[0])
        large = [num_bytes for _, num_bytes in running.values() if num_bytes > START_BYTES]
        assert sum(large) <= BUDGET or len(large) == 1
    assert len(media) == 0
