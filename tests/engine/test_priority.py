"""Requests that let others go first: their order, and the bound on how long they wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import Any

import pytest

from embedder.engine.admission import Admission
from embedder.engine.aio import embed_each, score_each
from embedder.engine.engine import Engine
from embedder.engine.priority import MAX_DELAY, QUEUE_SHARE, delay_of
from embedder.engine.scheduler import NO_DELAY, Scheduler
from embedder.errors import Overloaded
from embedder.inputs.items import Text
from embedder.inputs.pairs import Query
from embedder.settings import Settings
from tests.fake_model import FakeModel, busy_device, item, running, wait_until

TIMEOUT_S = 60.0
ONE_AT_A_TIME = {"max_batch_tokens": 64, "max_input_tokens": 64}  # an item of 50 characters fills a batch


def text(name: str) -> str:
    return f"{name:50}"


def seconds(priority: int) -> float:
    return delay_of(priority, TIMEOUT_S, 0.0).seconds


def test_delay_grows_with_the_priority_and_is_bounded() -> None:
    delays = [seconds(priority) for priority in (0, 1, 2, 3, 10, 1000, 2**63)]
    assert delays == sorted(delays)
    assert len(set(delays)) == len(delays)
    assert delays[:4] == [0, 3.75, 5, 5.625]
    assert delays[-1] <= MAX_DELAY * TIMEOUT_S


def test_negative_priority_is_no_earlier_than_the_default() -> None:
    assert delay_of(-1, TIMEOUT_S, 9.0) == delay_of(-(2**63), TIMEOUT_S, 9.0) == delay_of(0, TIMEOUT_S, 9.0) == NO_DELAY


def finish_order(engine: Engine, model: FakeModel, requests: Sequence[tuple[str, int]]) -> list[str]:
    """Submit requests of one text, by name and priority, while the device is busy. The names in the order of their
    ends.
    """
    ended: list[str] = []
    futures: list[Future[Any]] = []
    with ExitStack() as stack, busy_device(engine, model):
        for name, priority in requests:
            one = item(text(name))
            reservation = stack.enter_context(engine.reserve([one], priority))
            futures.append(engine.submit(one, reservation=reservation))
            futures[-1].add_done_callback(lambda _, name=name: ended.append(name))
        wait_until(lambda: len(engine._inputs) == len(requests))
    wait(futures, timeout=10)
    return ended


def test_requests_that_wait_run_in_the_order_of_their_priorities(model: FakeModel) -> None:
    with running(model, **ONE_AT_A_TIME) as engine:
        requests = [("third", 2), ("last", 1000), ("second", 1), ("first", 0), ("first too", -5)]
        assert finish_order(engine, model, requests) == ["first", "first too", "second", "third", "last"]


def test_request_waits_for_nothing_on_an_idle_device(model: FakeModel) -> None:
    model.gate.set()
    with running(model) as engine:
        started_s = time.monotonic()
        asyncio.run(embed_each(engine, [item("red")] * 3, TIMEOUT_S, priority=2**63))
        assert time.monotonic() - started_s < MAX_DELAY * TIMEOUT_S / 2


@pytest.mark.usefixtures("in_threads")
def test_items_that_wait_for_a_preprocessing_thread_have_the_same_order(model: FakeModel) -> None:
    model.gate.clear()
    with running(model, preprocess_threads=1) as engine, ExitStack() as stack:
        futures = [engine.submit(item("slow"))]
        wait_until(lambda: not len(engine._workers))
        for name, priority in (("last", 3), ("second", 1), ("first", 0)):
            reservation = stack.enter_context(engine.reserve([item(name)], priority))
            futures.append(engine.submit(item(name), reservation=reservation))
        model.gate.set()
        wait(futures, timeout=10)
    assert model.preprocessed == ["slow", "first", "second", "last"]


# In virtual time: a job of 10 tokens fills a batch, and takes a second


@pytest.mark.parametrize("priority", [1, 3, 2**63])
def test_no_stream_of_other_requests_delays_a_request_further(priority: int) -> None:
    queue: Scheduler[str] = Scheduler(10, seconds_per_token=0.1)
    queue.put("late", 10, "late", 0.0, delay_of(priority, TIMEOUT_S, 0.0))
    ended_s: dict[str, int] = {}
    for second in range(40):
        for number in range(2):  # twice as many as it can do
            queue.put(f"{second}.{number}", 10, object(), second)
        ended_s |= dict.fromkeys(queue.take(second), second)
    before = [float(job) for job in ended_s if job != "late" and ended_s[job] < ended_s["late"]]
    assert seconds(priority) - 1 < max(before) <= seconds(priority)  # when they arrived


def test_items_of_a_request_wait_at_most_twice_its_delay_and_not_one_after_the_other() -> None:
    queue: Scheduler[str] = Scheduler(10, seconds_per_token=0.1)
    for number in range(10):
        queue.put(f"late {number}", 10, "late", 0.0, delay_of(2**63, TIMEOUT_S, 0.0))
    ended_s: dict[str, int] = {}
    for second in range(60):
        queue.put(f"{second}", 10, object(), second)
        ended_s |= dict.fromkeys(queue.take(second), second)
    first_s, *_, last_s = (ended_s[f"late {number}"] for number in range(10))
    assert seconds(2**63) <= first_s <= 2 * seconds(2**63)
    assert last_s - first_s <= 2 * 10  # half of the device


def test_delay_does_not_begin_again_in_the_next_queue() -> None:
    delay = delay_of(2**63, TIMEOUT_S, 0.0)
    queue: Scheduler[str] = Scheduler(10, seconds_per_token=0.1)
    queue.put("late", 10, "late", delay.until_s, delay)
    queue.put("other", 10, "other", delay.until_s)
    assert queue.take(delay.until_s) == ["late"]


def test_requests_of_equal_priority_share_what_others_leave() -> None:
    """One that is large delays no other of the same priority by more than an item at a time."""
    queue: Scheduler[str] = Scheduler(10, seconds_per_token=0.1)
    for number in range(40):
        queue.put(f"large {number}", 10, "large", 0.0, delay_of(5, TIMEOUT_S, 0.0))
    for number in range(3):
        queue.put(f"small {number}", 10, "small", 5.0, delay_of(5, TIMEOUT_S, 5.0))
    order = [job for second in range(5, 48) for job in queue.take(second)]
    assert order.index("small 2") <= 20


def test_requests_with_a_priority_leave_half_of_the_queue_to_others() -> None:
    admission = Admission(Settings(max_queued_tokens=1000, max_input_tokens=512))
    admission.reserve(300, 0.0, priority=1)
    with pytest.raises(Overloaded, match=r"300 tokens wait, .* `priority` above 0 may fill only half of that$"):
        admission.reserve(201, 0.0, priority=1)  # it would begin in the first half, and end in the second
    admission.reserve(200, 0.0, priority=1)
    with pytest.raises(Overloaded, match=r"500 tokens wait, "):
        admission.reserve(1, 0.0, priority=1)
    admission.reserve(500, 0.0)
    with pytest.raises(Overloaded, match=r"allowed: up to 1000 \(EMBEDDER_MAX_QUEUED_TOKENS\)$"):
        admission.reserve(1, 0.0)
    assert QUEUE_SHARE == 0.5  # as the message has it


def test_empty_queue_accepts_a_request_with_a_priority_that_is_larger_than_its_half() -> None:
    admission = Admission(Settings(max_queued_tokens=1000, max_input_tokens=512))
    assert admission.reserve(900, 0.0, priority=1).num_tokens == 900


def test_documents_are_scored_in_the_order_of_the_priorities(model: FakeModel) -> None:
    async def rank(engine: Engine, name: str, priority: int, ended: list[str]) -> None:
        documents = [item(text(f"{name} {index}")) for index in range(3)]
        query = Query((Text("query"),), num_documents=len(documents))
        await score_each(engine, query, documents, 30, priority)
        ended.append(name)

    async def all_of_them(engine: Engine) -> list[str]:
        ended: list[str] = []
        requests = [
            rank(engine, name, priority, ended) for name, priority in (("last", 2), ("second", 1), ("first", 0))
        ]
        tasks = [asyncio.create_task(one) for one in requests]
        while len(engine._inputs) < 9:
            await asyncio.sleep(0.001)
        model.gate.set()
        await asyncio.gather(*tasks)
        return ended

    with running(model, **ONE_AT_A_TIME) as engine:
        model.gate.clear()
        holder = engine.submit(item("holder"))
        assert model.is_entered.wait(10)
        assert asyncio.run(all_of_them(engine)) == ["first", "second", "last"]
        holder.result(10)
