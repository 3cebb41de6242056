"""A thread that does not finish a step is reported; a process that is stopped for a while is not."""

from __future__ import annotations

import logging
import threading

import pytest

import embedder.engine.hang_watch
import embedder.engine.preprocess_workers
import embedder.inputs.preprocess
from embedder.engine.engine import Engine
from embedder.engine.hang_watch import HangWatch
from embedder.errors import DeviceFailed
from embedder.settings import Settings
from tests.fake_model import HIDDEN_SIZE, FakeModel, item, wait_until


@pytest.fixture(autouse=True)
def short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder.engine.hang_watch, "TICK_S", 0.02)


def test_thread_that_does_not_finish_is_reported_once() -> None:
    reasons: list[str] = []
    watch = HangWatch(reasons.append)
    gate = threading.Event()

    def hang() -> None:
        with watch.step("the step is not done", 0.1):
            gate.wait(30)

    thread = threading.Thread(target=hang)
    thread.start()
    wait_until(lambda: len(reasons) == 1)
    assert reasons == ["the step is not done within 0.1 s"]
    gate.set()
    thread.join()
    watch.close()


def test_steps_one_after_the_other_are_not_added_up() -> None:
    reasons: list[str] = []
    watch = HangWatch(reasons.append)
    for _ in range(30):
        with watch.step("the step is not done", 10 * embedder.engine.hang_watch.TICK_S):
            threading.Event().wait(0.02)
    watch.close()
    assert reasons == []


def test_hanging_thread_stops_the_engine_and_close_does_not_wait_for_it(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedder.inputs.preprocess, "SHORT_CHARS", -1)  # preprocess in threads
    monkeypatch.setattr(embedder.engine.preprocess_workers, "START_TIMEOUT_S", 0.1)
    model.gate.clear()
    reasons: list[str] = []
    settings = Settings(preprocess_threads=1, decode_timeout_s=0.1)
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, settings, on_failure=reasons.append)
    hanging, waiting = engine.submit(item("slow")), engine.submit(item("red"))
    for future in (hanging, waiting):
        with pytest.raises(DeviceFailed):
            future.result(30)
    assert reasons == ["thread preprocess-0 has not preprocessed an item (text) within 0.2 s"]
    assert "preprocess-0 has not preprocessed an item (text) within 0.2 s" in caplog.text
    engine.close()
    model.gate.set()


def test_close_does_not_wait_for_a_thread_whose_item_was_cancelled(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedder.inputs.preprocess, "SHORT_CHARS", -1)
    monkeypatch.setattr(embedder.engine.preprocess_workers, "JOIN_S", 0.1)
    model.gate.clear()
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(preprocess_threads=1))
    future = engine.submit(item("slow"))
    wait_until(lambda: len(engine._workers) == 0)
    future.cancel()
    with caplog.at_level(logging.ERROR):
        engine.close()
    assert "closing without waiting for threads that have not ended: preprocess-0" in caplog.text
    model.gate.set()
