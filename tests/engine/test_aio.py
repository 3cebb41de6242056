"""Requests in an event loop: what runs together, what is refused whole, and what a time limit or an error cancels."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import embedder.inputs.preprocess
from embedder.engine import starter
from embedder.engine.aio import ENDED_PER_TURN, SUBMITTED_PER_TURN, embed_all, embed_each
from embedder.engine.engine import Engine
from embedder.engine.postprocess import Embedding
from embedder.errors import DeadlineExceeded, InvalidRequest, Overloaded, UnsupportedDimensions
from embedder.settings import Settings
from tests.fake_model import HIDDEN_SIZE, FakeModel, item, running, unit


def test_embed_all_raises_the_first_error_with_its_index_and_cancels_the_other_items(model: FakeModel) -> None:
    with running(model) as engine:
        items = [item("red"), item("malformed"), item("green", dimensions=9)]
        with pytest.raises(InvalidRequest, match=r"^item 1: malformed"):
            asyncio.run(embed_all(engine, items, 30))
        assert engine.pending_tokens == 0


def test_embed_each_returns_an_error_in_the_place_of_its_item(model: FakeModel) -> None:
    refused = InvalidRequest("not parsed")
    with running(model) as engine:
        items = [item("red"), refused, item("malformed"), item("green", dimensions=9), item("blue")]
        outcomes = asyncio.run(embed_each(engine, items, 30))
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [Embedding, InvalidRequest, InvalidRequest, UnsupportedDimensions, Embedding]
    assert outcomes[1] is refused
    for outcome, text in ((outcomes[0], "red"), (outcomes[4], "blue")):
        assert isinstance(outcome, Embedding)
        np.testing.assert_array_equal(outcome.vector, unit(text))


def test_texts_that_arrive_in_one_turn_of_the_event_loop_run_together(model: FakeModel) -> None:
    async def arrive() -> None:
        await asyncio.gather(*(embed_all(engine, [item(f"text {index}")], 10) for index in range(40)))

    with running(model) as engine:
        asyncio.run(arrive())
        assert model.batches == [40]


def test_idle_device_starts_after_a_turn_of_the_event_loop_without_more_texts(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "MAX_START_DELAY_S", 60.0)

    async def arrive(engine: Engine, turn: int) -> None:
        for _ in range(turn):
            await asyncio.sleep(0)
        time.sleep(0.002)  # the device thread could start
        await embed_all(engine, [item("text")], 10)

    async def arrive_in_turns(engine: Engine) -> None:
        await asyncio.gather(*(arrive(engine, turn) for turn in (0, *range(11))))

    with running(model) as engine:
        asyncio.run(arrive_in_turns(engine))
        assert model.batches == [12]
        asyncio.run(arrive(engine, 3))  # another event loop
        assert model.batches == [12, 1]


def test_idle_device_starts_soon_while_more_texts_arrive(model: FakeModel) -> None:
    async def arrive_until_the_first_is_done(engine: Engine) -> int:
        tasks = [asyncio.create_task(embed_all(engine, [item(text)], 10)) for text in ("first", "second")]
        while len(tasks) < 1000 and not tasks[0].done():
            tasks.append(asyncio.create_task(embed_all(engine, [item(f"text {len(tasks)}")], 10)))
            await asyncio.sleep(0)
            time.sleep(0.0005)  # the device thread runs
        await asyncio.gather(*tasks)
        return len(tasks)

    with running(model) as engine:
        assert asyncio.run(arrive_until_the_first_is_done(engine)) < 1000


def test_submitting_many_items_lets_other_tasks_run_in_between(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        await embed_all(engine, [item("one")] * 10 * SUBMITTED_PER_TURN, 30)
        others.cancel()
        return turns_at_submit

    with running(model) as engine:
        assert asyncio.run(turns_of_others(engine))[-1] >= 9


def test_cancelling_many_items_lets_other_tasks_run_in_between(model: FakeModel) -> None:
    items = [item("malformed"), *(item(f"text {index}") for index in range(10 * ENDED_PER_TURN))]

    async def pending_tokens(engine: Engine) -> list[int]:
        with pytest.raises(InvalidRequest, match="malformed"):
            await embed_all(engine, items, 30)
        pending = [engine.pending_tokens]
        while pending[-1] and len(pending) < 100:
            await asyncio.sleep(0)
            pending.append(engine.pending_tokens)
        return pending

    model.gate.clear()
    with running(model) as engine:
        pending = asyncio.run(pending_tokens(engine))
        model.gate.set()
    steps = [before - after for before, after in itertools.pairwise(pending)]
    assert len(steps) >= 9
    assert max(steps) <= ENDED_PER_TURN * 40  # tokens of an item, at most
    assert pending[-1] == 0


def test_time_limit_removes_a_request_from_both_queues(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder.inputs.preprocess, "SHORT_CHARS", -1)  # preprocess in threads
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(preprocess_threads=1))
    model.gate.clear()
    computing = engine.submit(item("device"))
    assert model.is_entered.wait(10)
    texts = ["preprocessed", "slow", "never", "nor this"]
    with pytest.raises(DeadlineExceeded, match=r"^timeout: not done after 0.2 s"):
        asyncio.run(embed_all(engine, [item(text) for text in texts], 0.2))
    assert (len(engine._workers), len(engine._inputs)) == (0, 0)
    assert engine.pending_tokens == 31  # of "device"
    model.gate.set()
    assert computing.result(10).num_tokens == 6
    engine.close()
    assert {"never", "nor this"}.isdisjoint(model.preprocessed)
    assert model.batches == [1]


def test_request_that_does_not_fit_now_is_refused_whole(model: FakeModel) -> None:
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
    """They are submitted alternately, some items at a time."""
    items = [item("x" * 80)] * 60  # about 3000 tokens

    async def both(engine: Engine) -> list[object]:
        requests = (embed_all(engine, items, 30), embed_all(engine, items, 30))
        return await asyncio.gather(*requests, return_exceptions=True)

    with running(model, max_queued_tokens=3100, max_input_tokens=64) as engine:
        outcomes = asyncio.run(both(engine))
        assert engine.pending_tokens == 0
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Overloaded", "list"]
    assert len(model.preprocessed) == len(items)
