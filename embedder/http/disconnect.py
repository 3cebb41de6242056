"""Cancels the work of a request whose caller disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from embedder.engine.timers import start_timer

Result = TypeVar("Result")

WATCH_AFTER_S = 0.1  # after which a request without a response starts to watch for its caller's disconnect


async def unless_disconnected(work: Awaitable[Result], receive: Receive) -> Result:
    """Await `work`; if the caller disconnects, cancel it and raise `ClientDisconnect`."""
    task = asyncio.current_task()
    assert task is not None
    disconnect: asyncio.Future[Message] | None = None
    is_over = False

    def watch() -> None:
        nonlocal disconnect
        disconnect = asyncio.ensure_future(receive())
        disconnect.add_done_callback(lambda ended: is_over or ended.cancelled() or task.cancel())

    timer = start_timer(WATCH_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if disconnect is None or disconnect.cancelled() or not disconnect.done():
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        is_over = True
        timer.cancel()
        if disconnect:
            disconnect.cancel()
