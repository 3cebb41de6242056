"""Embeds a request's items from an event loop, within a time limit. The engine's threads do the work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from embedder.engine.admission import Reservation
from embedder.engine.engine import Engine
from embedder.engine.postprocess import Embedding
from embedder.engine.timers import TimeLimit
from embedder.errors import (
    ITEM_ERRORS,
    AttributedToItem,
    DeadlineExceeded,
    EmbedderError,
    attributed_to_query,
    without_traceback,
)
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.pairs import Query, pair_with
from embedder.inputs.preprocess import ModelInput

Outcome = Embedding | EmbedderError
Result = TypeVar("Result")

# A loop over items yields to the event loop after this many items.
SUBMITTED_PER_TURN = 16  # about 2 ms of short texts
ENDED_PER_TURN = 64  # about 1 ms, if they fail or are cancelled


async def embed_all(
    engine: Engine, items: Sequence[EmbeddingItem | EmbedderError], timeout_s: float, priority: int = 0
) -> list[Embedding]:
    """Embed all items, in order. Raises the first error in order, with the item's index, and cancels the other items.

    Also raises `DeadlineExceeded` after `timeout_s`, and `Overloaded`, `RequestTooLarge`, `ShuttingDown` and
    `DeviceFailed`, which concern the whole request. With a `priority` above 0, requests with a lower one go first.
    """
    return await _compute(engine, items, timeout_s, priority, _embeddings)


async def embed_each(
    engine: Engine, items: Sequence[EmbeddingItem | EmbedderError], timeout_s: float, priority: int = 0
) -> list[Outcome]:
    """Embed the items, in order: each gives its embedding or its error. An error among the items is returned as is.

    Raises the errors that concern the whole request, and takes `priority`, as `embed_all` does.
    """
    return await _compute(engine, items, timeout_s, priority, _outcomes)


async def score_each(
    engine: Engine,
    query: Query,
    documents: Sequence[EmbeddingItem | EmbedderError],
    timeout_s: float,
    priority: int = 0,
) -> list[Outcome]:
    """Score the documents against the query, in order: each gives its log-odds, as an embedding of one value, or its
    error.

    Raises the errors of the query, and those that concern the whole request, and takes `priority`, as `embed_all` does.
    """
    return await _compute(engine, documents, timeout_s, priority, _outcomes, query)


async def outcome(future: Future[Embedding]) -> Outcome:
    """Await the embedding of an item, or the error that concerns only this item. Raises all other errors."""
    try:
        embedding: Embedding = await _result(future)
    except ITEM_ERRORS as error:
        return without_traceback(error)
    return embedding


async def _outcomes(futures: Sequence[Future[Embedding]]) -> list[Outcome]:
    outcomes = []
    for index, future in enumerate(futures, 1):
        outcomes.append(await outcome(future))
        if index % ENDED_PER_TURN == 0:
            await asyncio.sleep(0)
    return outcomes


async def _embeddings(futures: Sequence[Future[Embedding]]) -> list[Embedding]:
    embeddings = []
    with AttributedToItem() as block:
        for block.index, future in enumerate(futures):
            embeddings.append(await _result(future))
    return embeddings


async def _result(future: Future[Any]) -> Any:
    """Await the result of a future, which is not cancelled with the caller. Most of a request's futures end together.

    `asyncio.wrap_future` does more and takes twice as long.
    """
    if not future.done():
        loop = asyncio.get_running_loop()
        is_done = loop.create_future()

        def end_wait() -> None:
            if not is_done.done():  # cancelled
                is_done.set_result(None)

        def wake(_: Future[Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(end_wait)

        future.add_done_callback(wake)
        await is_done
    return future.result()


async def _compute(
    engine: Engine,
    items: Sequence[EmbeddingItem | EmbedderError],
    timeout_s: float,
    priority: int,
    collect: Callable[[Sequence[Future[Embedding]]], Awaitable[Result]],
    query: Query | None = None,
) -> Result:
    """Submit the items, and return what `collect` makes of their futures. Then cancel those that are not done.

    With a query, the items are documents; each is submitted as a pair once the query is prepared.
    """
    request, loop = object(), asyncio.get_running_loop()
    futures: list[Future[Embedding]] = []
    try:
        with TimeLimit(timeout_s):
            valid = [item for item in (query, *items) if isinstance(item, EmbeddingItem)]
            with _reserved(engine, valid, priority) as reservation:
                if query:
                    prepared = await _prepared(engine, query, request, reservation)
                    items = [
                        pair_with(query, prepared, item) if isinstance(item, EmbeddingItem) else item for item in items
                    ]
                for start in range(0, len(items), SUBMITTED_PER_TURN):
                    engine.starter.start_soon(loop)
                    with engine.lock:
                        for item in items[start : start + SUBMITTED_PER_TURN]:
                            futures.append(_submit(engine, item, request, reservation))
                    if len(futures) < len(items):
                        await asyncio.sleep(0)
            result = await collect(futures)
            futures.clear()  # all are done
            return result
    except TimeoutError as error:
        raise DeadlineExceeded(f"timeout: not done after {timeout_s:g} s, the limit for a request's items") from error
    finally:
        if futures:
            _cancel(engine, futures)


def _reserved(
    engine: Engine, items: Sequence[EmbeddingItem], priority: int
) -> AbstractContextManager[Reservation | None]:
    """The capacity for a request's items.

    A single item needs no reservation: if the queue is full, `submit` refuses it. A request with a priority always has
    one, because the reservation carries the priority.
    """
    return engine.reserve(items, priority) if len(items) > 1 or priority else nullcontext()


def _cancel(engine: Engine, futures: Sequence[Future[Embedding]], start: int = 0) -> None:
    """Cancel the futures from `start` on, the first ones at once and the others in the next turns of the loop."""
    end = start + ENDED_PER_TURN
    with engine.lock:
        for future in futures[start:end]:
            future.cancel()  # has no effect on those that are done
    if end < len(futures):
        asyncio.get_running_loop().call_soon(_cancel, engine, futures, end)


async def _prepared(engine: Engine, query: Query, request: object, reservation: Reservation | None) -> ModelInput:
    """The preprocessed query. Raises its error, which says that it is the query's."""
    future: Future[Any] = Future()
    try:
        with attributed_to_query():
            future = engine.submit(query, request=request, reservation=reservation)
            prepared = await _result(future)
    finally:
        future.cancel()
    assert isinstance(prepared, ModelInput)
    return prepared


def _submit(
    engine: Engine, item: EmbeddingItem | EmbedderError, request: object, reservation: Reservation | None
) -> Future[Embedding]:
    """The item's future, which is failed already if the item is refused."""
    try:
        if isinstance(item, EmbedderError):
            raise item
        return engine.submit(item, request=request, reservation=reservation, wake=False)
    except ITEM_ERRORS as error:
        refused: Future[Embedding] = Future()
        refused.set_exception(without_traceback(error))
        return refused
