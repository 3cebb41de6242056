"""One admitted item on its way through the engine, and errors that reveal no more than its caller may know."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from embedder.engine.callers import CALLER
from embedder.engine.observer import ItemTrace
from embedder.engine.scheduler import NO_DELAY, Delay
from embedder.errors import DeviceFailed, DeviceOutOfMemory, EngineFailed
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.preprocess import ModelInput


@dataclass(eq=False)
class Job:
    """An item, its future, and what is known of it so far.

    `request`: which request it belongs to; None: one of its own. `caller` has sent it. `num_tokens` is the estimate at
    admission. `delay` is how much longer its request waits than others. `num_bytes` is the size of `model_input`, which
    preprocessing sets. `fetched` is the item with bytes in place of its URLs, while it waits for a process.
    `is_repeated`: its first process was killed.
    `key` identifies the content if vectors are cached; otherwise it is different for every job. `context` is the
    request's: log records and traces need it in the engine's threads. The future gives an Embedding, or for a query its
    ModelInput.
    """

    item: EmbeddingItem
    request: object
    num_tokens: int
    delay: Delay = NO_DELAY
    caller: str = field(default_factory=CALLER.get)
    num_bytes: int = 0
    fetched: EmbeddingItem | None = None
    is_repeated: bool = False
    future: Future[Any] = field(default_factory=Future)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    trace: ItemTrace = field(init=False)
    model_input: ModelInput = field(init=False)
    key: Hashable = field(default_factory=object)

    def __post_init__(self) -> None:
        if self.request is None:
            self.request = object()

    def run(self, function: Callable[..., Any], *arguments: object) -> None:
        """Call a function in the context of the request, for its log records and its trace."""
        # In a copy: a context can be entered once, and the thread that has passed on the job may not have left it yet.
        self.context.copy().run(function, *arguments)

    def log_error(self, logger: logging.Logger, message: str, *values: object, exc: Exception | None = None) -> None:
        """Log an error in the context of the request, so that the record carries the request's id."""
        self.run(partial(logger.error, message, *values, exc_info=exc))


def device_failed() -> DeviceFailed:
    """The error of an item that waits when the device fails."""
    return DeviceFailed("the device failed, and nothing more can be embedded; the service's log has the reason")


def item_failed(error: Exception | None = None, num_tokens: int = 0) -> EngineFailed:
    """The error of an item for which preprocessing or the forward pass raised an unexpected `error`."""
    if isinstance(error, DeviceOutOfMemory):
        return DeviceOutOfMemory(f"an item of {num_tokens} tokens does not fit the device's memory, even by itself")
    return EngineFailed("the item could not be embedded; the service's log has the reason")
