"""Equal content is computed once: bookkeeping of the jobs that wait for it, then the same through the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait

import numpy as np
import pytest

from embedder.engine.cache import ENTRY_BYTES
from embedder.engine.coalescing import CoalescingCache
from embedder.engine.engine import Engine
from embedder.engine.postprocess import Embedding
from embedder.errors import EngineFailed
from tests.fake_model import HIDDEN_SIZE, FakeModel, item, row, running, submit_together, unit

ROW = np.arange(HIDDEN_SIZE, dtype=np.float32)
ROW_BYTES = ROW.nbytes + ENTRY_BYTES


@pytest.fixture
def cache() -> CoalescingCache[str]:
    return CoalescingCache(10 * ROW_BYTES)


def is_idle(cache: CoalescingCache[str], key: str) -> bool:
    """Whether no job waits for the row, and none computes it."""
    return not cache.is_awaited(key) and cache.start_computing(key, "probe")


def test_jobs_that_wait_for_equal_content_are_all_scheduled_and_one_computes_for_all(
    cache: CoalescingCache[str],
) -> None:
    assert [cache.add_waiting("red", job) for job in ("first", "second", "third")] == [True, True, True]
    assert cache.start_computing("red", "second")  # the scheduler chose this one
    assert not cache.start_computing("red", "first")
    assert cache.store_row("red", ROW) == ["first", "third"]
    assert is_idle(cache, "red")


def test_job_for_content_that_is_being_computed_is_not_scheduled(cache: CoalescingCache[str]) -> None:
    cache.add_waiting("red", "first")
    cache.start_computing("red", "first")
    assert not cache.is_awaited("red")
    assert not cache.add_waiting("red", "late")
    assert cache.is_awaited("red")
    assert cache.add_waiting("green", "other")


def test_computed_row_is_found(cache: CoalescingCache[str]) -> None:
    assert cache.find_row("red") is None
    cache.start_computing("red", "first")
    assert cache.store_row("red", ROW) == []
    found = cache.find_row("red")
    assert found is not None
    np.testing.assert_array_equal(found, ROW)


def test_removed_job_is_not_served(cache: CoalescingCache[str]) -> None:
    cache.add_waiting("red", "first")
    cache.start_computing("red", "first")
    cache.add_waiting("red", "late")
    cache.remove_waiting("red", "late")
    cache.remove_waiting("red", "unknown")
    assert not cache.is_awaited("red")
    assert cache.store_row("red", ROW) == []


def test_failed_computation_returns_its_jobs_and_keeps_no_row(cache: CoalescingCache[str]) -> None:
    cache.add_waiting("red", "first")
    cache.start_computing("red", "first")
    cache.add_waiting("red", "late")
    assert cache.stop_computing("red") == ["late"]
    assert cache.find_row("red") is None
    assert cache.add_waiting("red", "next")  # which is computed anew
    assert cache.start_computing("red", "next")


# Through the engine


@pytest.fixture
def engine(model: FakeModel) -> Iterator[Engine]:
    with running(model, cache_bytes=100 * ROW_BYTES) as engine:
        yield engine


def test_equal_content_is_computed_once_whatever_is_made_of_its_row(engine: Engine, model: FakeModel) -> None:
    first = engine.submit(item("red")).result(10)
    raw = engine.submit(item("red", normalize=False, instruction="The fake model ignores it.")).result(10)
    again = engine.submit(item("red")).result(10)
    np.testing.assert_array_equal(first.vector, again.vector)
    np.testing.assert_array_equal(raw.vector, row("red"))
    assert [first.is_cached, raw.is_cached, again.is_cached] == [False, True, True]
    assert model.batches == [1]


def test_equal_items_that_wait_together_are_coalesced(engine: Engine, model: FakeModel) -> None:
    texts = ["red", "green", "red", "red"]
    futures = submit_together(engine, model, texts)
    wait(futures, timeout=10)
    assert model.batches == [1, 2]
    assert sorted(future.result().is_cached for future in futures) == [False, False, True, True]
    for text, future in zip(texts, futures, strict=True):
        np.testing.assert_array_equal(future.result().vector, unit(text))


def test_cancelling_one_of_several_coalesced_items_leaves_the_others_their_result(
    engine: Engine, model: FakeModel
) -> None:
    model.gate.clear()
    computing = engine.submit(item("red"))
    assert model.is_entered.wait(10)
    coalesced = [engine.submit(item("red")) for _ in range(3)]
    assert computing.cancel()
    assert coalesced[0].cancel()
    model.gate.set()
    for future in coalesced[1:]:
        np.testing.assert_array_equal(future.result(10).vector, unit("red"))
    assert submit_together(engine, model, ["green"])[0].result(10).num_tokens == 5
    assert engine.submit(item("red")).result(10).is_cached
    engine.close()
    assert engine.pending_tokens == 0


@pytest.mark.parametrize("text", ["poison", "infinite"])
def test_failure_is_shared_by_coalesced_items_and_not_cached(text: str, engine: Engine, model: FakeModel) -> None:
    for future in submit_together(engine, model, [text, text]):
        with pytest.raises(EngineFailed):
            future.result(10)
    num_batches = len(model.batches)
    with pytest.raises(EngineFailed):
        engine.submit(item(text)).result(10)
    assert len(model.batches) == num_batches + 1
    assert len(engine._cache.vectors) == 1  # only the row of the holder


def test_many_threads_that_submit_equal_items_get_equal_vectors(engine: Engine, model: FakeModel) -> None:
    texts = [f"text {index % 7}" for index in range(200)]
    results: dict[int, Embedding] = {}

    def submit(start: int) -> None:
        futures = {index: engine.submit(item(texts[index])) for index in range(start, 200, 8)}
        results.update({index: future.result(20) for index, future in futures.items()})

    threads = [threading.Thread(target=submit, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    for index, result in results.items():
        np.testing.assert_array_equal(result.vector, unit(texts[index]))
    assert sum(model.batches) == 7
    assert sum(result.is_cached for result in results.values()) == 193
