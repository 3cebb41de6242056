"""The engine with a hand-written model: a row is what its text says, and some texts break things."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest

import embedder.engine.engine
import embedder.inputs.preprocess
from embedder.engine.aio import SUBMITTED_AT_ONCE, embed_all, embed_each
from embedder.engine.engine import Engine, WaitForRows
from embedder.engine.postprocess import Embedding
from embedder.errors import (
    DeadlineExceeded,
    DeviceFailed,
    DeviceOutOfMemory,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
    UnsupportedDimensions,
)
from embedder.inputs.preprocess import ModelInput
from embedder.settings import Settings
from tests.fake_model import HIDDEN_SIZE, FakeModel, held_back, item, running, unit


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is short enough to be preprocessed by whoever submits it."""
    monkeypatch.setattr(embedder.inputs.preprocess, "SHORT_CHARS", -1)


@pytest.fixture(params=["by the caller", "in threads"])
def engine(model: FakeModel, request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "in threads":
        request.getfixturevalue("in_threads")
    with running(model, max_batch_tokens=1024, max_input_tokens=1024, max_queued_tokens=4096) as engine:
        yield engine


def test_answers_belong_to_their_items(engine: Engine) -> None:
    texts = [f"text {index}" for index in range(50)]
    futures = [engine.submit(item(text)) for text in texts]
    for text, future in zip(texts, futures, strict=True):
        np.testing.assert_allclose(future.result(10).vector, unit(text), atol=1e-7)


def test_items_that_wait_while_the_device_is_busy_run_together(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    first = engine.submit(item("first"))
    time.sleep(0.1)  # it is on the device now
    others = [engine.submit(item(f"text {index}")) for index in range(20)]
    time.sleep(0.2)
    model.gate.set()
    wait([first, *others], timeout=10)
    assert model.batches == [1, 20]


@pytest.mark.usefixtures("in_threads")
def test_large_request_holds_up_nobody_in_either_queue(model: FakeModel) -> None:
    settings = Settings(preprocess_threads=1, max_batch_tokens=64, max_input_tokens=64)
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, settings)
    model.gate.clear()
    slow = engine.submit(item("slow"))
    bulk = [engine.submit(item(f"{index:50}"), request="bulk") for index in range(100)]
    query = engine.submit(item("query"))
    model.gate.set()
    done: list[int] = []
    for future in bulk:
        future.add_done_callback(lambda _: done.append(1))
    query.add_done_callback(lambda _: done.append(100))
    wait([slow, query, *bulk], timeout=10)
    assert model.preprocessed.index("query") <= 3
    assert done.index(100) <= 6  # behind those of the bulk request that were through before it
    engine.close()


def test_malformed_item_fails_alone(engine: Engine) -> None:
    good, bad = engine.submit(item("good")), engine.submit(item("malformed"))
    with pytest.raises(InvalidRequest, match="malformed"):
        bad.result(10)
    np.testing.assert_allclose(good.result(10).vector, unit("good"), atol=1e-7)


def test_item_that_breaks_the_forward_pass_fails_alone(
    engine: Engine, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.gate.clear()
    held = engine.submit(item("held"))
    time.sleep(0.1)
    texts = [f"text {index}" for index in range(20)]
    futures = {text: engine.submit(item(text)) for text in (*texts[:7], "poison", *texts[7:])}
    time.sleep(0.2)
    model.gate.set()
    with caplog.at_level(logging.ERROR), pytest.raises(EngineFailed) as failure:
        futures["poison"].result(10)
    assert "secret" not in str(failure.value)
    assert "secret internals" in caplog.text
    for text in texts:
        np.testing.assert_allclose(futures[text].result(10).vector, unit(text), atol=1e-7)
    np.testing.assert_allclose(held.result(10).vector, unit("held"), atol=1e-7)
    np.testing.assert_allclose(engine.submit(item("next")).result(10).vector, unit("next"), atol=1e-7)


@pytest.mark.parametrize(("text", "reason"), [("bug", "a bug in preprocessing"), ("panic", "a panic in a library")])
def test_bug_in_preprocessing_fails_its_item_alone(
    text: str, reason: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(engine.settings.preprocess_threads + 1):  # no thread is lost
        with caplog.at_level(logging.ERROR), pytest.raises(EngineFailed, match="log has the reason"):
            engine.submit(item(text)).result(10)
    assert reason in caplog.text
    assert engine.submit(item("next")).result(10).num_tokens == 4


def test_program_that_is_interrupted_leaves_nothing_behind(model: FakeModel) -> None:
    with running(model) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.submit(item("interrupted"))
        assert engine.pending_tokens == 0
        model.gate.set()
        assert engine.submit(item("next")).result(10).num_tokens == 4


def test_text_that_woke_nobody_is_embedded_when_it_is_time_or_over(model: FakeModel) -> None:
    model.gate.set()
    with running(model) as engine:
        future = engine.submit(item("text"), wake=False)
        engine.wake()
        assert future.result(10).num_tokens == 4
        last = engine.submit(item("last"), wake=False)
    assert last.result(0).num_tokens == 4


def test_texts_that_come_in_one_turn_of_the_event_loop_run_together(model: FakeModel) -> None:
    async def come() -> None:
        await asyncio.gather(*(embed_all(engine, [item(f"text {index}")], 10) for index in range(40)))

    with running(model) as engine:
        model.gate.set()
        asyncio.run(come())
        assert model.batches == [40]


def test_value_that_is_not_finite_is_an_error_never_an_answer(engine: Engine, model: FakeModel) -> None:
    before, bad, after = held_back(engine, model, ["before", "infinite", "after"])
    with pytest.raises(EngineFailed, match="not finite"):
        bad.result(10)
    np.testing.assert_allclose(before.result(10).vector, unit("before"), atol=1e-7)
    np.testing.assert_allclose(after.result(10).vector, unit("after"), atol=1e-7)
    assert model.batches == [1, 3]


def test_batch_that_does_not_fit_is_split_and_the_next_ones_are_smaller_for_a_while(
    engine: Engine, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.engine.engine, "FITTING_BATCHES", 12)
    model.capacity = 450
    texts = [f"{index:100}" for index in range(10)]
    for text, future in zip(texts, held_back(engine, model, texts), strict=True):
        np.testing.assert_allclose(future.result(10).vector, unit(text), atol=1e-7)
    assert model.batches == [1, 10, 5, 2, 3, 5, 2, 3]
    model.batches.clear()
    wait(held_back(engine, model, texts), timeout=10)
    assert model.batches == [1, 2, 2, 2, 2, 2]  # half of 500, which did not fit, each
    model.capacity = 2000  # somebody else has let go of the memory
    sizes = []
    for _ in range(30):
        engine.submit(item("fits")).result(10)
        sizes.append(engine._inputs.max_batch_tokens)
    assert list(dict.fromkeys(sizes)) == [250, 500, 1000, 1024]
    assert sizes.count(500) + sizes.count(1000) in range(23, 26)  # 12 each; the last one may not be counted yet


def test_item_that_does_not_fit_alone_fails_alone(engine: Engine, model: FakeModel) -> None:
    model.capacity = 450
    before, large, after = held_back(engine, model, ["before", "x" * 500, "after"])
    with pytest.raises(DeviceOutOfMemory, match=r"^an item of 500 tokens does not fit the device's memory, even alone"):
        large.result(10)
    np.testing.assert_allclose(before.result(10).vector, unit("before"), atol=1e-7)
    np.testing.assert_allclose(after.result(10).vector, unit("after"), atol=1e-7)


@pytest.fixture
def ahead(model: FakeModel) -> Iterator[Engine]:
    """An engine that launches one batch ahead; a batch has room for two of `x` * 50."""
    settings = Settings(max_batch_tokens=100, max_input_tokens=100)
    engine = Engine(model.preprocess, model.launch_ahead, HIDDEN_SIZE, settings, max_in_flight=2)
    yield engine
    model.gate.set()
    engine.close()


def test_one_batch_is_launched_ahead_and_no_more(ahead: Engine, model: FakeModel) -> None:
    model.gate.clear()
    futures = [ahead.submit(item(f"{index:50}")) for index in range(9)]
    deadline = time.monotonic() + 10
    while model.num_launched < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.2)
    assert model.num_launched == 2
    model.gate.set()
    for index, future in enumerate(futures):
        np.testing.assert_allclose(future.result(10).vector, unit(f"{index:50}"), atol=1e-7)


def test_device_waits_for_no_launch_while_work_waits() -> None:
    """Launching takes 10 ms, computing 20: of ten batches the device waits for the first alone."""
    seconds = {}
    for max_in_flight in (1, 2):
        model = FakeModel(seconds_per_item=0.01)
        model.gate.set()

        def launch(inputs: list[ModelInput], model: FakeModel = model) -> WaitForRows:
            time.sleep(0.01)
            return model.launch_ahead(inputs)

        settings = Settings(max_batch_tokens=100, max_input_tokens=100)
        engine = Engine(model.preprocess, launch, HIDDEN_SIZE, settings, max_in_flight=max_in_flight)
        start = time.monotonic()
        wait([engine.submit(item(f"{index:50}")) for index in range(20)], timeout=10)
        seconds[max_in_flight] = time.monotonic() - start
        engine.close()
    assert seconds[2] < 0.85 * seconds[1]  # 0.21 of 0.3 s


def test_batch_that_fails_ahead_of_another_costs_nobody_else(ahead: Engine, model: FakeModel) -> None:
    model.capacity = 90
    texts = [f"{index:40}" for index in range(6)]
    futures = held_back(ahead, model, [*texts[:1], "poison", *texts[1:]], num_launched=2)
    with pytest.raises(EngineFailed):
        futures[1].result(10)
    for text, future in zip(texts, [futures[0], *futures[2:]], strict=True):
        np.testing.assert_allclose(future.result(10).vector, unit(text), atol=1e-7)


def test_device_that_hangs_with_two_batches_is_given_up(model: FakeModel) -> None:
    settings = Settings(max_batch_tokens=100, max_input_tokens=100)
    engine = Engine(model.preprocess, model.launch_ahead, HIDDEN_SIZE, settings, max_in_flight=2, stuck_after_s=0.3)
    model.gate.clear()
    futures = [engine.submit(item(f"{index:50}")) for index in range(9)]
    for future in futures:
        with pytest.raises(DeviceFailed):
            future.result(10)
    model.gate.set()


def test_lost_device_fails_whoever_waits_and_says_so_once(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    reasons: list[str] = []
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(), on_failure=reasons.append)
    futures = held_back(engine, model, ["assert", *(f"text {index}" for index in range(20))])
    for future in futures:
        with pytest.raises(DeviceFailed, match="log has the reason"):
            future.result(10)
    with pytest.raises(DeviceFailed):
        engine.submit(item("late"), wait=True)
    engine.close()
    assert reasons == [engine.failure] == ["the device failed: device-side assert"]
    assert "gives up with 21 items waiting: the device failed: device-side assert" in caplog.text
    assert engine.pending_tokens == 0


def test_device_that_hangs_is_given_up(model: FakeModel) -> None:
    reasons: list[str] = []
    settings = Settings(max_queued_tokens=64)
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, settings, stuck_after_s=0.3, on_failure=reasons.append)
    assert engine.submit(item("an idle device is not stuck")).result(10).num_tokens == 27
    time.sleep(0.5)
    model.gate.clear()
    stuck = engine.submit(item("stuck"))
    with pytest.raises(DeviceFailed):  # waits for room that never comes
        engine.submit(item("x" * 200), wait=True)
    with pytest.raises(DeviceFailed):
        stuck.result(10)
    engine.close()
    model.gate.set()  # the device comes back, to nobody
    assert reasons == ["the device did not finish a batch within 0.3 s"]


def test_bug_in_the_engines_thread_leaves_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: float) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(engine._inputs, "take", broken)
    with pytest.raises(DeviceFailed):
        engine.submit(item("text")).result(10)
    assert engine.failure == "a bug ended the engine's thread"


def test_cancelled_item_does_not_shift_results(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    held = engine.submit(item("held"))
    time.sleep(0.1)
    futures = [engine.submit(item(f"text {index}")) for index in range(5)]
    time.sleep(0.2)
    assert futures[2].cancel()
    model.gate.set()
    for index in (0, 1, 3, 4):
        np.testing.assert_allclose(futures[index].result(10).vector, unit(f"text {index}"), atol=1e-7)
    held.result(10)
    assert model.batches == [1, 4]


def test_unsupported_dimensions_are_refused_before_any_work(engine: Engine, model: FakeModel) -> None:
    with pytest.raises(UnsupportedDimensions, match=r"got 9; allowed: a whole number from 8 to 8"):
        engine.submit(item("text", dimensions=9))
    assert model.batches == []


def test_full_queue_refuses_with_a_time_to_come_back(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    long = "x" * 1000  # 280 estimated tokens of the 4096
    futures = [engine.submit(item(long)) for _ in range(14)]
    with pytest.raises(Overloaded, match=r"3920 tokens wait; allowed: up to 4096") as refusal:
        engine.submit(item(long))
    assert refusal.value.retry_after_s >= 1
    model.gate.set()
    wait(futures, timeout=10)
    assert engine.pending_tokens == 0
    assert engine.submit(item("next")).result(10).num_tokens == 4


def test_time_to_come_back_is_near_the_truth(engine: Engine, model: FakeModel) -> None:
    """A device of 0.2 s an item, and a queue of 14 items: it has drained after 2.8 s."""
    model.seconds_per_item = 0.2
    engine.submit(item("warm")).result(10)
    futures = [engine.submit(item("x" * 1000), wait=True) for _ in range(20)]
    with pytest.raises(Overloaded) as refusal:
        engine.submit(item("x" * 1000))
    start_s = time.monotonic()
    wait(futures, timeout=20)
    assert refusal.value.retry_after_s == pytest.approx(time.monotonic() - start_s, rel=0.3)


def test_waiting_submit_goes_on_when_there_is_room(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    futures = [engine.submit(item("x" * 1000)) for _ in range(14)]
    threading.Timer(0.2, model.gate.set).start()
    futures.append(engine.submit(item("x" * 1000), wait=True))
    assert all(future.result(10).num_tokens == 1000 for future in futures)


def test_failed_and_cancelled_items_free_their_place(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    futures = [engine.submit(item(text)) for text in ("malformed", "bug", "infinite", "poison", "good", "cancelled")]
    futures[-1].cancel()
    model.gate.set()
    wait(futures, timeout=10)
    engine.submit(item("last")).result(10)
    assert engine.pending_tokens == 0


@pytest.mark.parametrize(
    "text", ["good", "malformed", "undecodable", "bug", "panic", "infinite", "poison", "cancelled"]
)
def test_answered_item_is_let_go_of_while_its_future_is_kept(
    text: str, engine: Engine, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, not when garbage is collected: a picture's pixels are megabytes."""
    caplog.set_level(logging.CRITICAL + 1)  # pytest would keep what is logged, with its tracebacks
    model.gate.clear()
    one = item(text)
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
        deadline = time.monotonic() + 5
        while reference() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("in_threads")
def test_deadline_empties_both_queues_at_once(model: FakeModel) -> None:
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(preprocess_threads=1))
    model.gate.clear()
    on_the_device = engine.submit(item("device"))
    assert model.is_entered.wait(10)
    texts = ["preprocessed", "slow", "not yet", "nor this"]
    with pytest.raises(DeadlineExceeded, match=r"^timeout: not done after 0.5 s"):
        asyncio.run(embed_all(engine, [item(text) for text in texts], 0.5))
    assert (len(engine._items), len(engine._inputs)) == (0, 0)
    assert engine.pending_tokens == 31  # of "device"
    model.gate.set()
    assert on_the_device.result(10).num_tokens == 6
    engine.close()
    assert model.preprocessed == ["device", "preprocessed", "slow"]
    assert model.batches == [1]


def test_submitting_many_items_lets_others_run_in_between(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def turns_of_others(engine: Engine) -> list[int]:
        turns = 0
        turns_at_submit = []
        submit = engine.submit

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        def count(*arguments: Any, **options: Any) -> Future[Embedding]:
            turns_at_submit.append(turns)
            return submit(*arguments, **options)

        monkeypatch.setattr(engine, "submit", count)
        others = asyncio.create_task(take_turns())
        await embed_all(engine, [item("one")] * 10 * SUBMITTED_AT_ONCE, 30)
        others.cancel()
        return turns_at_submit

    with running(model) as engine:
        assert asyncio.run(turns_of_others(engine))[-1] >= 9


def test_close_finishes_what_was_admitted_and_refuses_the_rest(model: FakeModel) -> None:
    model.gate.clear()
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings())
    futures = [engine.submit(item(f"text {index}")) for index in range(10)]
    threading.Timer(0.2, model.gate.set).start()
    engine.close()
    assert all(future.done() for future in futures)
    assert [future.result().num_tokens for future in futures] == [6] * 10
    with pytest.raises(ShuttingDown):
        engine.submit(item("late"))


def test_request_that_no_queue_could_hold_is_refused_for_good(model: FakeModel) -> None:
    settings = Settings(max_queued_tokens=100, max_input_tokens=64)
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, settings)
    with engine.room_for([item("a" * 4000)]):  # one is always let in, and never counts for more than it is cut to
        assert engine.pending_tokens == 64
        with engine.room_for([]):
            pass
    assert engine.pending_tokens == 0
    with (
        pytest.raises(RequestTooLarge, match="about 128 tokens; allowed: up to 100"),
        engine.room_for([item("a" * 4000)] * 2),
    ):
        pass
    engine.close()


def test_request_that_does_not_fit_now_is_refused_whole(model: FakeModel) -> None:
    """Let in by halves, its first items would be computed for nothing."""
    model.gate.clear()
    with running(model, max_queued_tokens=200, max_input_tokens=64) as engine:
        first = engine.submit(item("runs"))
        pending_tokens = engine.pending_tokens
        with pytest.raises(Overloaded):
            asyncio.run(embed_all(engine, [item("waits")] * 6, 30))
        with pytest.raises(Overloaded):
            asyncio.run(embed_each(engine, [item("waits")] * 6, 30))
        assert engine.pending_tokens == pending_tokens
        model.gate.set()
        assert first.result(10)
    assert model.batches == [1]


def test_of_two_requests_that_do_not_fit_together_one_is_refused_whole(model: FakeModel) -> None:
    """They are submitted in turns, some items at a time."""
    items = [item("x" * 80)] * 60  # about 3000 tokens

    async def both(engine: Engine) -> list[object]:
        requests = (embed_all(engine, items, 30), embed_all(engine, items, 30))
        return await asyncio.gather(*requests, return_exceptions=True)

    with running(model, max_queued_tokens=3100, max_input_tokens=64) as engine:
        outcomes = asyncio.run(both(engine))
        assert engine.pending_tokens == 0
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Overloaded", "list"]
    assert len(model.preprocessed) == len(items)


@pytest.mark.usefixtures("in_threads")
def test_preprocessing_waits_while_what_it_made_fills_the_memory(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.engine.engine, "READY_BYTES", 5)
    monkeypatch.setattr(ModelInput, "num_bytes", property(lambda _: 1))
    model.gate.clear()
    with running(model, preprocess_threads=2) as engine:
        futures = [engine.submit(item(f"text {index}")) for index in range(20)]
        futures[0].cancel()
        time.sleep(0.3)
        assert len(model.preprocessed) in range(5, 8)  # a thread may be at one, and one was given up
        model.gate.set()
        assert [future.result(10).num_tokens for future in futures[1:10]] == [6] * 9
        wait(futures, timeout=10)
        assert engine._ready_bytes == 0


def test_time_to_come_back_is_no_longer_than_anybody_waits(model: FakeModel) -> None:
    with running(model, max_queued_tokens=200, max_input_tokens=64, request_timeout_s=7) as engine:
        engine.submit(item("warm")).result(10)
        model.gate.clear()
        for _ in range(20):  # all given up: nothing is answered in all that time
            future = engine.submit(item("given up"))
            engine._answered_at_s -= 60
            future.cancel()
        with pytest.raises(Overloaded) as refusal:
            [engine.submit(item("x" * 100)) for _ in range(20)]
        assert refusal.value.retry_after_s == 7
