"""Callers share the queue, the device and the threads, however many requests each of them sends."""

from __future__ import annotations

import contextvars
import random
from concurrent.futures import Future, wait
from typing import Any

import pytest

import embedder.inputs.preprocess
from embedder.engine.admission import Admission
from embedder.engine.callers import CALLER, EVERYONE, SharedCapacity
from embedder.engine.engine import Engine
from embedder.errors import Overloaded
from embedder.settings import Settings
from tests.fake_model import FakeModel, busy_device, item, running, wait_until

SETTINGS = Settings(max_queued_tokens=8000)


def submit(engine: Engine, caller: str, name: str) -> Future[Any]:
    """Submit an item as a request of its own."""

    def run() -> Future[Any]:
        CALLER.set(caller)
        return engine.submit(item(f"{name:50}"))

    return contextvars.copy_context().run(run)


def test_device_knows_whose_items_wait(model: FakeModel) -> None:
    with running(model) as engine, busy_device(engine, model):
        futures = [submit(engine, caller, f"{caller} {number}") for caller in ("one", "two") for number in range(2)]
        wait_until(lambda: len(engine._inputs) == len(futures))
        assert engine._inputs._callers.keys() == {"one", "two"}
    wait(futures, timeout=10)


def test_preprocessing_goes_round_the_callers(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder.inputs.preprocess, "SHORT_CHARS", -1)
    model.gate.clear()
    with running(model, preprocess_threads=1) as engine:
        futures = [engine.submit(item("slow"))]
        wait_until(lambda: not len(engine._workers))
        futures += [submit(engine, "many", f"many {number}") for number in range(3)] + [submit(engine, "one", "one")]
        model.gate.set()
        wait(futures, timeout=10)
    assert [text.strip() for text in model.preprocessed] == ["slow", "many 0", "one", "many 1", "many 2"]


def test_full_share_of_a_caller_leaves_room_for_others() -> None:
    admission = Admission(SETTINGS)
    admission.reserve(7000, caller="many")
    with pytest.raises(Overloaded, match=r"7000 of the tokens that wait are of this API key.* up to 7000 now"):
        admission.reserve(1, caller="many")
    with pytest.raises(Overloaded, match="this API key"):
        admission.admit(1, None, 0.0, "many")
    one = admission.reserve(500, caller="one")
    with pytest.raises(Overloaded, match="allowed: up to 8000"):
        admission.reserve(501, caller="two")
    admission.release_reservation(one)
    admission.reserve(800, caller="two")


def test_share_of_a_caller_is_free_again_when_its_items_leave() -> None:
    admission = Admission(SETTINGS)
    admission.admit(6000, None, 0.0, "many")
    admission.admit(1000, None, 0.0, "many")
    admission.release([("many", 1000)], num_cancelled_tokens=0, now_s=1.0)
    admission.admit(1000, None, 1.0, "many")
    admission.release([("many", 6000), ("many", 1000)], num_cancelled_tokens=0, now_s=2.0)
    assert admission.pending_tokens == 0
    admission.admit(9000, None, 2.0, "many")  # an empty queue accepts everything


def test_everyone_may_use_all_of_a_capacity() -> None:
    shared = SharedCapacity(800)
    shared.add(EVERYONE, 300)
    assert shared.allowed(EVERYONE) == 800
    shared.add("one", 100)
    assert (shared.allowed(EVERYONE), shared.allowed("one")) == (700, 437)


@pytest.mark.parametrize(("num_callers", "least"), [(1, 1 / 8), (2, 1 / 20), (5, 1 / 256)])
def test_part_of_a_capacity_is_free_although_callers_use_as_much_as_they_can(num_callers: int, least: float) -> None:
    generator = random.Random(0)
    shared = SharedCapacity(2**20)
    callers = [f"caller {number}" for number in range(num_callers)]
    for number in range(5000):
        caller = generator.choice(callers)
        shared.add(caller, max(0, shared.allowed(caller) - shared.used_by(caller)))
        assert number < 2000 or shared.capacity - shared.used >= least * shared.capacity  # the first took too much
        caller = generator.choice(callers)
        shared.add(caller, -min(shared.used_by(caller), shared.capacity // 50))
    for caller in callers:
        shared.add(caller, -shared.used_by(caller))
    assert shared.used == 0
    assert not shared._used_with_keys
