"""The engine with a fake model: results belong to their items, and failures stay where they happen."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest

import embedder.engine.batch_limits
import embedder.engine.engine
from embedder.engine.admission import estimate_tokens
from embedder.engine.device import WaitForRows
from embedder.engine.engine import Engine
from embedder.engine.preprocess_workers import SECONDS_PER_ESTIMATED_TOKEN
from embedder.engine.scheduler import BatchLength
from embedder.errors import (
    DeviceFailed,
    DeviceOutOfMemory,
    EngineFailed,
    InputTooLong,
    InvalidRequest,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
    UnsupportedDimensions,
)
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.preprocess import ModelInput
from embedder.settings import Settings
from tests.fake_model import HIDDEN_SIZE, FakeModel, busy_device, item, running, submit_together, unit, wait_until


@pytest.fixture(params=["by the caller", "in threads"])
def engine(model: FakeModel, request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "in threads":
        request.getfixturevalue("in_threads")
    with running(model, max_batch_tokens=1024, max_input_tokens=1024, max_queued_tokens=4096) as engine:
        yield engine


# Order


def test_each_item_gets_its_own_vector(engine: Engine) -> None:
    texts = [f"text {index}" for index in range(50)]
    futures = [engine.submit(item(text)) for text in texts]
    for text, future in zip(texts, futures, strict=True):
        np.testing.assert_allclose(future.result(10).vector, unit(text), atol=1e-7)


def test_items_that_wait_while_the_device_is_busy_run_together(engine: Engine, model: FakeModel) -> None:
    wait(submit_together(engine, model, [f"text {index}" for index in range(20)]), timeout=10)
    assert model.batches == [1, 20]


@pytest.mark.usefixtures("in_threads")
def test_large_request_delays_a_query_by_one_of_its_items_at_each_stage(model: FakeModel) -> None:
    with running(model, preprocess_threads=1, max_batch_tokens=64, max_input_tokens=64) as engine:
        model.gate.clear()
        slow = engine.submit(item("slow"))
        start_s = time.monotonic()
        bulk = [engine.submit(item(f"{index:50}"), request="bulk") for index in range(100)]
        query = engine.submit(item("query"))
        bulk_item_s = SECONDS_PER_ESTIMATED_TOKEN * estimate_tokens(item(f"{0:50}"), engine.settings)
        num_earlier = (time.monotonic() - start_s) // bulk_item_s  # items whose turn came before the query arrived
        done: list[str] = []
        for future in bulk:
            future.add_done_callback(lambda _: done.append("bulk"))
        query.add_done_callback(lambda _: done.append("query"))
        model.gate.set()
        wait([slow, query, *bulk], timeout=10)
        assert model.preprocessed.index("query") <= 3 + num_earlier
        assert done.index("query") <= 6 + num_earlier  # after what was preprocessed before it


def test_cancelled_item_does_not_shift_the_results_of_others(engine: Engine, model: FakeModel) -> None:
    with busy_device(engine, model):
        futures = [engine.submit(item(f"text {index}")) for index in range(5)]
        wait_until(lambda: len(engine._inputs) == 5)
        assert futures[2].cancel()
    for index in (0, 1, 3, 4):
        np.testing.assert_allclose(futures[index].result(10).vector, unit(f"text {index}"), atol=1e-7)
    assert model.batches == [1, 4]


def test_text_submitted_without_waking_is_computed_at_the_next_wake_or_at_close(model: FakeModel) -> None:
    with running(model) as engine:
        future = engine.submit(item("text"), wake=False)
        engine.wake()
        assert future.result(10).num_tokens == 4
        last = engine.submit(item("last"), wake=False)
    assert last.result(0).num_tokens == 4


# Failures of one item


def test_malformed_item_fails_by_itself(engine: Engine) -> None:
    good, bad = engine.submit(item("good")), engine.submit(item("malformed"))
    with pytest.raises(InvalidRequest, match="malformed"):
        bad.result(10)
    np.testing.assert_allclose(good.result(10).vector, unit("good"), atol=1e-7)


def test_item_that_breaks_the_forward_pass_fails_by_itself(
    engine: Engine, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"text {index}" for index in range(20)]
    with caplog.at_level(logging.ERROR):
        futures = submit_together(engine, model, [*texts[:7], "poison", *texts[7:]])
        with pytest.raises(EngineFailed) as failure:
            futures.pop(7).result(10)
    assert "secret" not in str(failure.value)
    assert "secret internals" in caplog.text
    for text, future in zip(texts, futures, strict=True):
        np.testing.assert_allclose(future.result(10).vector, unit(text), atol=1e-7)
    np.testing.assert_allclose(engine.submit(item("next")).result(10).vector, unit("next"), atol=1e-7)


@pytest.mark.parametrize(("text", "reason"), [("bug", "a bug in preprocessing"), ("panic", "a panic in a library")])
def test_bug_in_preprocessing_fails_its_item_and_ends_no_thread(
    text: str, reason: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(engine.settings.preprocess_threads + 1):
        with caplog.at_level(logging.ERROR), pytest.raises(EngineFailed, match="log has the reason"):
            engine.submit(item(text)).result(10)
    assert reason in caplog.text
    assert engine.submit(item("next")).result(10).num_tokens == 4


def test_interrupted_program_leaves_no_pending_item(model: FakeModel) -> None:
    with running(model) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.submit(item("interrupted"))
        assert engine.pending_tokens == 0
        assert engine.submit(item("next")).result(10).num_tokens == 4


def test_value_that_is_not_finite_is_an_error_and_never_a_result(engine: Engine, model: FakeModel) -> None:
    before, bad, after = submit_together(engine, model, ["before", "infinite", "after"])
    with pytest.raises(EngineFailed, match="not finite"):
        bad.result(10)
    np.testing.assert_allclose(before.result(10).vector, unit("before"), atol=1e-7)
    np.testing.assert_allclose(after.result(10).vector, unit("after"), atol=1e-7)
    assert model.batches == [1, 3]


# Out of memory


def test_batch_that_does_not_fit_is_halved_and_the_next_ones_are_smaller_for_a_while(
    engine: Engine, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.engine.batch_limits, "FITTING_BATCHES", 12)
    model.capacity = 450
    texts = [f"{index:100}" for index in range(10)]
    for text, future in zip(texts, submit_together(engine, model, texts), strict=True):
        np.testing.assert_allclose(future.result(10).vector, unit(text), atol=1e-7)
    assert model.batches == [1, 10, 5, 2, 3, 5, 2, 3]
    model.batches.clear()
    wait(submit_together(engine, model, texts), timeout=10)
    assert model.batches == [1, 2, 2, 2, 2, 2]  # each has half of 500 tokens, which did not fit
    model.capacity = 2000  # another program has released the memory
    sizes = []
    for _ in range(30):
        engine.submit(item("fits")).result(10)
        sizes.append(engine._inputs.max_batch_tokens)
    assert list(dict.fromkeys(sizes)) == [250, 500, 1000, 1024]
    assert sizes.count(500) + sizes.count(1000) in range(23, 26)  # 12 each; the last batch may not be counted yet


def test_item_that_does_not_fit_by_itself_fails_by_itself(engine: Engine, model: FakeModel) -> None:
    model.capacity = 450
    before, large, after = submit_together(engine, model, ["before", "x" * 500, "after"])
    with pytest.raises(DeviceOutOfMemory, match=r"^an item of 500 tokens does not fit .* memory, even by itself$"):
        large.result(10)
    np.testing.assert_allclose(before.result(10).vector, unit("before"), atol=1e-7)
    np.testing.assert_allclose(after.result(10).vector, unit("after"), atol=1e-7)


def test_batch_is_as_short_as_the_engine_is_told(model: FakeModel) -> None:
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(), batch_length=BatchLength(1e-9, 100))
    with contextlib.closing(engine):
        for future in submit_together(engine, model, [f"{index:50}" for index in range(5)]):
            future.result(10)
    assert model.batches == [1, 2, 2, 1]  # the first is the one that holds the device


# Two batches in flight


@pytest.fixture
def ahead(model: FakeModel) -> Iterator[Engine]:
    """An engine that launches one batch ahead. Two texts of 50 characters fit one batch."""
    settings = Settings(max_batch_tokens=100, max_input_tokens=100)
    engine = Engine(model.preprocess, model.launch_ahead, HIDDEN_SIZE, settings, max_in_flight=2)
    yield engine
    model.gate.set()
    engine.close()


def test_one_batch_is_launched_ahead_and_no_more(ahead: Engine, model: FakeModel) -> None:
    model.gate.clear()
    with ahead.lock:  # so that the device thread sees all of them at once
        futures = [ahead.submit(item(f"{index:50}")) for index in range(9)]
    wait_until(lambda: model.num_launched == 2)
    time.sleep(0.05)  # in which a third would be launched
    assert model.num_launched == 2
    model.gate.set()
    for index, future in enumerate(futures):
        np.testing.assert_allclose(future.result(10).vector, unit(f"{index:50}"), atol=1e-7)


@pytest.mark.parametrize(
    ("max_in_flight", "expected"),
    [
        (1, "launch 0, wait 0, launch 1, wait 1, launch 2, wait 2, launch 3, wait 3"),
        (2, "launch 0, wait 0, launch 1, launch 2, wait 1, launch 3, wait 2, wait 3"),
    ],
)
def test_with_two_in_flight_the_next_batch_is_launched_before_the_first_is_waited_for(
    max_in_flight: int, expected: str, model: FakeModel
) -> None:
    calls: list[str] = []

    def launch(inputs: list[ModelInput]) -> WaitForRows:
        number = model.num_launched
        calls.append(f"launch {number}")
        result = model.launch_ahead(inputs)

        def wait_for_rows() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
            calls.append(f"wait {number}")
            return result()

        return wait_for_rows

    settings = Settings(max_batch_tokens=100, max_input_tokens=100)
    engine = Engine(model.preprocess, launch, HIDDEN_SIZE, settings, max_in_flight=max_in_flight)
    with busy_device(engine, model):
        wait_until(lambda: calls == ["launch 0", "wait 0"])
        futures = [engine.submit(item(f"{index:50}")) for index in range(6)]
    wait(futures, timeout=10)
    engine.close()
    assert ", ".join(calls) == expected


def test_batch_that_fails_while_another_is_in_flight_affects_no_other_item(ahead: Engine, model: FakeModel) -> None:
    model.capacity = 90
    texts = [f"{index:40}" for index in range(6)]
    futures = submit_together(ahead, model, [*texts[:1], "poison", *texts[1:]], num_launched=2)
    with pytest.raises(EngineFailed):
        futures[1].result(10)
    for text, future in zip(texts, [futures[0], *futures[2:]], strict=True):
        np.testing.assert_allclose(future.result(10).vector, unit(text), atol=1e-7)


# Failures of the device


def test_failed_device_fails_all_pending_items_and_is_reported_once(
    model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: list[str] = []
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(), on_failure=reasons.append)
    futures = submit_together(engine, model, ["assert", *(f"text {index}" for index in range(20))])
    for future in futures:
        with pytest.raises(DeviceFailed, match="log has the reason"):
            future.result(10)
    with pytest.raises(DeviceFailed):
        engine.submit(item("late"), wait=True)
    engine.close()
    wait_until(lambda: len(reasons) == 1)
    assert reasons == [engine.failure] == ["the device failed: device-side assert"]
    assert "stops with 21 items pending: the device failed: device-side assert" in caplog.text
    assert engine.pending_tokens == 0


def test_hanging_device_fails_pending_items_and_those_that_wait_for_capacity(model: FakeModel) -> None:
    reasons: list[str] = []
    settings = Settings(max_queued_tokens=64)
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, settings, stuck_after_s=0.1, on_failure=reasons.append)
    model.gate.clear()
    stuck = engine.submit(item("stuck"))
    with pytest.raises(DeviceFailed):
        engine.submit(item("x" * 200), wait=True)
    with pytest.raises(DeviceFailed):
        stuck.result(10)
    engine.close()
    model.gate.set()  # the late rows belong to no pending item
    wait_until(lambda: reasons == ["the device did not finish a batch within 0.1 s"])


def test_device_that_hangs_with_two_batches_in_flight_fails_all_pending_items(model: FakeModel) -> None:
    settings = Settings(max_batch_tokens=100, max_input_tokens=100)
    engine = Engine(model.preprocess, model.launch_ahead, HIDDEN_SIZE, settings, max_in_flight=2, stuck_after_s=0.1)
    model.gate.clear()
    futures = []
    with contextlib.suppress(DeviceFailed):  # if this takes longer than 0.1 s
        for index in range(9):
            futures.append(engine.submit(item(f"{index:50}")))
    for future in futures:
        with pytest.raises(DeviceFailed):
            future.result(10)
    model.gate.set()
    assert engine.failure == "the device did not finish a batch within 0.1 s"


def test_unexpected_error_in_the_device_thread_fails_all_pending_items(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: float) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(engine._inputs, "take", broken)
    with pytest.raises(DeviceFailed):
        engine.submit(item("text")).result(10)
    assert engine.failure == "the device thread ended with an unexpected error"


# Admission


def test_what_a_caller_gets_wrong_is_refused_before_it_is_queued(model: FakeModel) -> None:
    with running(model, max_text_chars=10) as engine:
        with pytest.raises(UnsupportedDimensions, match=r"got 9; allowed: a whole number from 8 to 8"):
            engine.submit(item("text", dimensions=9))
        with pytest.raises(InputTooLong, match=r"^text of 11 characters"):
            engine.submit(item("x" * 11))
        assert engine.pending_tokens == 0
    assert model.preprocessed == []


def test_full_queue_refuses_an_item_with_a_time_to_retry(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    long = "x" * 1000  # 280 estimated tokens of the 4096
    futures = [engine.submit(item(long)) for _ in range(14)]
    with pytest.raises(Overloaded, match=r"3920 tokens wait, and this request has about 280; .*up to 4096") as refusal:
        engine.submit(item(long))
    assert refusal.value.retry_after_s >= 1
    model.gate.set()
    wait(futures, timeout=10)
    assert engine.pending_tokens == 0
    assert engine.submit(item("next")).result(10).num_tokens == 4


def test_time_to_retry_is_the_time_in_which_the_queue_drains(
    engine: Engine, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that takes 0.2 s per item drains a queue of 14 items in 2.8 s."""
    clock = SimpleNamespace(now_s=1000.0, sleep=time.sleep)
    clock.monotonic = lambda: clock.now_s
    monkeypatch.setattr(embedder.engine.engine, "time", clock)

    def advance_clock(num_items: int) -> None:
        clock.now_s += 0.2 * num_items

    model.on_batch = advance_clock
    for _ in range(10):
        engine.submit(item("x" * 1000)).result(10)
    model.gate.clear()
    futures = [engine.submit(item("x" * 1000)) for _ in range(14)]
    with pytest.raises(Overloaded) as refusal:
        engine.submit(item("x" * 1000))
    assert refusal.value.retry_after_s == pytest.approx(2.8, rel=0.01)
    model.gate.set()
    wait(futures, timeout=10)


def test_submit_with_wait_blocks_until_there_is_capacity(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    futures = [engine.submit(item("x" * 1000)) for _ in range(14)]
    opener = threading.Timer(0.1, model.gate.set)
    opener.start()
    futures.append(engine.submit(item("x" * 1000), wait=True))
    assert all(future.result(10).num_tokens == 1000 for future in futures)
    opener.join()


def test_reservation_counts_as_pending_until_it_is_released(model: FakeModel) -> None:
    with running(model, max_queued_tokens=100, max_input_tokens=64) as engine:
        with engine.reserve([item("a" * 4000)]):  # counts no more than the 64 tokens to which it is cut
            assert engine.pending_tokens == 64
            with engine.reserve([]):
                pass
        assert engine.pending_tokens == 0
        with pytest.raises(RequestTooLarge), engine.reserve([item("a" * 4000)] * 2):
            pass
        assert engine.pending_tokens == 0


# Releasing


def test_failed_and_cancelled_items_release_their_capacity(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    futures = [engine.submit(item(text)) for text in ("malformed", "bug", "infinite", "poison", "good", "cancelled")]
    futures[-1].cancel()
    model.gate.set()
    wait(futures, timeout=10)
    engine.submit(item("last")).result(10)
    assert engine.pending_tokens == 0


class WeaklyReferencedItem(EmbeddingItem):
    """A subclass without slots, which weak references need."""


@pytest.mark.parametrize(
    "text", ["good", "malformed", "undecodable", "bug", "panic", "infinite", "poison", "cancelled"]
)
def test_item_is_freed_when_its_future_is_done_even_if_the_future_is_kept(
    text: str, engine: Engine, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, not at the next garbage collection: an image's pixels are megabytes."""
    caplog.set_level(logging.CRITICAL + 1)  # pytest keeps what is logged, with its tracebacks
    model.gate.clear()
    one = WeaklyReferencedItem(item(text).parts)
    reference = weakref.ref(one)
    gc.disable()
    try:
        future = engine.submit(one)
        del one
        if text == "cancelled":
            future.cancel()
        model.gate.set()
        wait([future], timeout=10)
        engine.submit(item("last")).result(10)
        wait_until(lambda: reference() is None)
    finally:
        gc.enable()


def test_close_finishes_what_was_admitted_and_refuses_the_rest(model: FakeModel) -> None:
    model.gate.clear()
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings())
    futures = [engine.submit(item(f"text {index}")) for index in range(10)]
    opener = threading.Timer(0.1, model.gate.set)
    opener.start()
    engine.close()
    assert all(future.done() for future in futures)
    assert [future.result().num_tokens for future in futures] == [6] * 10
    with pytest.raises(ShuttingDown):
        engine.submit(item("late"))
    opener.join()


def test_close_does_not_wait_for_a_device_that_hangs(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU no watchdog ends the process, and nobody may wait for the batch anymore."""
    monkeypatch.setattr("embedder.engine.preprocess_workers.JOIN_S", 0.1)
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings())
    model.gate.clear()
    future = engine.submit(item("a"))
    assert model.is_entered.wait(10)
    future.cancel()
    engine.close()
    assert caplog.messages == ["closing without waiting for threads that have not ended: engine"]
    model.gate.set()
