"""Requests that score documents, in the engine: refused whole, cancelled whole, and fair to other requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from embedder.engine.admission import estimate_tokens
from embedder.engine.aio import Outcome, embed_all, score_each
from embedder.engine.engine import Engine
from embedder.engine.postprocess import Embedding
from embedder.errors import DeadlineExceeded, EmbedderError, EngineFailed, InvalidRequest, Overloaded, RequestTooLarge
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.pairs import Query
from tests.engine.test_engine import SECONDS_PER_ESTIMATED_TOKEN
from tests.fake_model import FakeModel, busy_device, item, row, running, wait_until


def rank(
    engine: Engine, documents: list[EmbeddingItem | EmbedderError], query: str = "query", timeout_s: float = 30
) -> Coroutine[Any, Any, list[Outcome]]:
    """A request. The fake model's row of a pair is that of its document."""
    return score_each(engine, Query((Text(query),), num_documents=len(documents)), documents, timeout_s)


def documents(count: int, num_chars: int = 10) -> list[EmbeddingItem | EmbedderError]:
    return [item(f"{index:{num_chars}}") for index in range(count)]


@contextmanager
def in_thread(request: Coroutine[Any, Any, list[Outcome]]) -> Iterator[Future[list[Outcome]]]:
    """Run the request in an event loop of its own thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(asyncio.run, request)


def test_of_100_documents_3_fail_where_they_can_fail_and_97_have_their_own_score(model: FakeModel) -> None:
    """In preprocessing, in the forward pass of their batch, and by a value that is not finite."""
    texts = [f"document {index}" for index in range(100)]
    texts[3], texts[50], texts[98] = "malformed", "poison", "infinite"
    with running(model) as engine:
        outcomes = asyncio.run(rank(engine, [item(text) for text in texts]))
        assert engine.pending_tokens == 0
    errors = {index: type(one) for index, one in enumerate(outcomes) if isinstance(one, EmbedderError)}
    assert errors == {3: InvalidRequest, 50: EngineFailed, 98: EngineFailed}
    for text, one in zip(texts, outcomes, strict=True):
        if isinstance(one, Embedding):  # log-odds are not normalized
            np.testing.assert_array_equal(one.vector, row(text))


def test_request_that_does_not_fit_now_is_refused_before_its_query_is_prepared(model: FakeModel) -> None:
    with running(model, max_queued_tokens=200, max_input_tokens=64) as engine:
        with busy_device(engine, model):
            pending_tokens = engine.pending_tokens
            with pytest.raises(Overloaded) as refused:
                asyncio.run(rank(engine, documents(5)))
            assert refused.value.retry_after_s >= 1
            with pytest.raises(RequestTooLarge):
                asyncio.run(rank(engine, documents(100)))
            assert engine.pending_tokens == pending_tokens
        assert model.preprocessed == ["holder"]
        assert len(asyncio.run(rank(engine, documents(2)))) == 2


def test_of_two_requests_that_do_not_fit_together_one_is_refused_whole(model: FakeModel) -> None:
    async def both(engine: Engine) -> list[object]:
        requests = (rank(engine, documents(60, 80), "first"), rank(engine, documents(60, 80), "second"))
        return await asyncio.gather(*requests, return_exceptions=True)

    with running(model, max_queued_tokens=3200, max_input_tokens=64) as engine:
        outcomes = asyncio.run(both(engine))
        assert engine.pending_tokens == 0
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Overloaded", "list"]
    assert len(model.preprocessed) == 61  # the documents of one, and its query


@pytest.mark.usefixtures("in_threads")
def test_time_limit_while_the_query_is_prepared_drops_the_documents(model: FakeModel) -> None:
    model.gate.clear()
    with running(model, preprocess_threads=1) as engine:
        with pytest.raises(DeadlineExceeded, match=r"^timeout: not done after 0.1 s"):
            asyncio.run(rank(engine, documents(5), "slow", timeout_s=0.1))
        assert engine.pending_tokens == 0
        model.gate.set()
        assert len(asyncio.run(embed_all(engine, [item("next")], 30))) == 1
    assert set(model.preprocessed) <= {"slow", "next"}


def test_caller_that_leaves_takes_its_documents_out_of_the_queue(model: FakeModel) -> None:
    async def leave(engine: Engine) -> None:
        request = asyncio.create_task(rank(engine, documents(20)))
        while len(engine._inputs) < 20:
            await asyncio.sleep(0.001)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    with running(model) as engine:
        with busy_device(engine, model):
            pending_tokens = engine.pending_tokens
            asyncio.run(leave(engine))
            assert (len(engine._inputs), engine.pending_tokens) == (0, pending_tokens)
        assert len(asyncio.run(embed_all(engine, [item("next")], 30))) == 1
    assert model.batches == [1, 1]  # the holder, and the next one


def test_batch_of_pairs_whose_caller_has_left_stops_between_two_layers(model: FakeModel) -> None:
    finished: list[int] = []

    async def leave(engine: Engine) -> None:
        request = asyncio.create_task(rank(engine, documents(20)))
        await asyncio.to_thread(model.is_entered.wait, 10)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        model.gate.set()

    with running(model) as engine:

        def layer(num_items: int) -> None:
            engine.stop_if_abandoned()
            finished.append(num_items)

        model.on_batch = layer
        model.gate.clear()
        asyncio.run(leave(engine))
        assert len(asyncio.run(embed_all(engine, [item("next")], 30))) == 1
        assert engine.pending_tokens == 0
    assert finished == [1]


@pytest.mark.parametrize("query", ["malformed", "bug"])
def test_query_that_fails_ends_its_request_and_no_other(query: str, model: FakeModel) -> None:
    with running(model) as engine:
        with busy_device(engine, model), in_thread(rank(engine, documents(8))) as other:
            wait_until(lambda: len(engine._inputs) == 8)
            with pytest.raises((InvalidRequest, EngineFailed), match=r"^query: "):
                asyncio.run(rank(engine, documents(5), query))
            model.gate.set()
            assert all(isinstance(one, Embedding) for one in other.result(10))
        assert engine.pending_tokens == 0


@pytest.mark.usefixtures("in_threads")
def test_100_documents_delay_another_callers_text_by_one_of_them_at_each_stage(model: FakeModel) -> None:
    with running(model, preprocess_threads=1, max_batch_tokens=64, max_input_tokens=64) as engine:
        first = [item("slow"), *documents(100, 50)]
        model.gate.clear()
        start_s = time.monotonic()
        with in_thread(rank(engine, first)) as ranking:
            wait_until(lambda: len(engine._workers) >= 99)
            other = engine.submit(item("other"))
            document_s = SECONDS_PER_ESTIMATED_TOKEN * estimate_tokens(item(f"{0:50}"), engine.settings)
            num_earlier = (time.monotonic() - start_s) // document_s  # whose turn came before the other text arrived
            num_batches: list[int] = []
            other.add_done_callback(lambda _: num_batches.append(len(model.batches)))
            model.gate.set()
            assert len(ranking.result(10)) == 101
            wait_until(lambda: bool(num_batches))
    assert model.preprocessed.index("other") <= 4 + num_earlier
    assert num_batches[0] <= 6 + num_earlier
    assert len(model.batches) > 50


def test_two_rankings_and_a_text_share_batches(model: FakeModel) -> None:
    with (
        running(model) as engine,
        busy_device(engine, model),
        in_thread(rank(engine, documents(7))) as one,
        in_thread(rank(engine, documents(9), "b")) as two,
    ):
        wait_until(lambda: len(engine._inputs) == 16)
        text = engine.submit(item("text"))
        model.gate.set()
        assert (len(one.result(10)), len(two.result(10)), text.result(10).num_tokens) == (7, 9, 4)
    assert model.batches == [1, 17]
