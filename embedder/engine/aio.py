"""EmbeddingItems -> their Embeddings, awaited in an event loop within a time, by the engine's threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager

from embedder.engine.engine import Engine, Room
from embedder.engine.postprocess import Embedding
from embedder.errors import ITEM_ERRORS, DeadlineExceeded, EmbedderError, attributed_to_item, without_traceback
from embedder.inputs.items import EmbeddingItem

Outcome = Embedding | EmbedderError

SUBMITTED_AT_ONCE = 16  # items: some 2 ms of texts; then the event loop looks after others


async def embed_all(
    engine: Engine, items: Sequence[EmbeddingItem | EmbedderError], timeout_s: float
) -> list[Embedding]:
    """Every item's Embedding, in order. Raises the first error in order, with its index, and gives up the others."""
    embeddings = []
    async with _submitted(engine, items, timeout_s) as futures:
        for index, future in enumerate(futures):
            with attributed_to_item(index):
                embeddings.append(await _result(future))
    return embeddings


async def embed_each(engine: Engine, items: Sequence[EmbeddingItem | EmbedderError], timeout_s: float) -> list[Outcome]:
    """Every item's Embedding or error, in order. An error among the items, of its parsing, is its outcome.

    Raises one that concerns more than an item: the device is lost.
    """
    async with _submitted(engine, items, timeout_s) as futures:
        return [await _outcome(future) for future in futures]


async def _outcome(future: Future[Embedding]) -> Outcome:
    try:
        return await _result(future)
    except ITEM_ERRORS as error:
        return without_traceback(error)


async def _result(future: Future[Embedding]) -> Embedding:
    """Most of a request's are there with the first."""
    return future.result() if future.done() else await asyncio.wrap_future(future)


@asynccontextmanager
async def _submitted(
    engine: Engine, items: Sequence[EmbeddingItem | EmbedderError], timeout_s: float
) -> AsyncIterator[list[Future[Embedding]]]:
    """A future for each item. Those not done at the end are given up.

    Raises `DeadlineExceeded`, and what concerns the request and no single item: `Overloaded`, `RequestTooLarge`,
    `ShuttingDown`, `DeviceFailed`.
    """
    request, loop = object(), asyncio.get_running_loop()
    futures: list[Future[Embedding]] = []
    try:
        async with asyncio.timeout(timeout_s):
            with engine.room_for([item for item in items if isinstance(item, EmbeddingItem)]) as room:
                for start in range(0, len(items), SUBMITTED_AT_ONCE):
                    loop.call_soon(engine.wake)  # not before what else came in this turn of the loop is submitted
                    for item in items[start : start + SUBMITTED_AT_ONCE]:
                        futures.append(_submit(engine, item, request, room))
                    if len(futures) < len(items):
                        await asyncio.sleep(0)
            yield futures
    except TimeoutError as error:
        raise DeadlineExceeded(f"timeout: not done after {timeout_s:g} s, the limit") from error
    finally:
        for future in futures:
            future.cancel()  # those still waiting, after an error or when the caller went away


def _submit(engine: Engine, item: EmbeddingItem | EmbedderError, request: object, room: Room) -> Future[Embedding]:
    """An item's future, which has failed already where that item is refused."""
    try:
        if isinstance(item, EmbedderError):
            raise item
        return engine.submit(item, request=request, room=room, wake=False)
    except ITEM_ERRORS as error:
        refused: Future[Embedding] = Future()
        refused.set_exception(without_traceback(error))
        return refused
