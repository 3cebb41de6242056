"""What the engine tells of its work: numbers and times, and nothing of what callers sent.

The engine calls an `Observer`; who measures (`metrics`) is one. Whoever wants to know of the items of one request
(`tracing`) sets `ITEM_TRACES` around it. All times are seconds of `time.monotonic`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from embedder.inputs.items import EmbeddingItem, Image, Part, Text, Video
from embedder.inputs.preprocess import ModelInput

if TYPE_CHECKING:
    from concurrent.futures import Future

    from embedder.engine.postprocess import Embedding

Kind = Literal["text", "image", "video", "mixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_KIND_OF_PART: dict[type[Part], Kind] = {Text: "text", Image: "image", Video: "video"}


@dataclass(frozen=True)
class Batch:
    """What ran together. `num_tokens`: as the scheduler counts them against its budget."""

    num_items: int
    num_tokens: int
    started_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        """How long the device took."""
        return self.ended_s - self.started_s


@dataclass(slots=True)
class ItemTrace:
    """One item's way through the engine; None and 0 stand where it has not come to, or will not.

    `num_tokens` counts text and visual tokens; the first `num_prefix_tokens` of them are shared with other items.
    """

    kind: Kind
    estimated_tokens: int
    admitted_s: float
    preprocess_started_s: float | None = None
    preprocess_ended_s: float | None = None
    num_tokens: int = 0
    num_visual_tokens: int = 0
    num_prefix_tokens: int = 0
    num_cut_tokens: int = 0
    batch: Batch | None = None

    @contextmanager
    def preprocessing(self) -> Iterator[None]:
        """Takes the time of what runs inside, also where it fails."""
        self.preprocess_started_s = time.monotonic()
        try:
            yield
        finally:
            self.preprocess_ended_s = time.monotonic()

    def count(self, model_input: ModelInput) -> None:
        """Take over how large it turned out to be."""
        self.num_tokens = model_input.num_tokens
        self.num_visual_tokens = len(model_input.visual_index)
        self.num_prefix_tokens = model_input.num_prefix_tokens
        self.num_cut_tokens = model_input.num_cut_tokens


class Observer:
    """Is told what becomes of items, by the engine's threads, which wait meanwhile. This one does not care."""

    def admitted(self, trace: ItemTrace) -> None:
        """An item has a place in the queue."""

    def preprocessed(self, trace: ItemTrace) -> None:
        """An item was preprocessed, or failed there: then it has no tokens."""

    def ran(self, batch: Batch, traces: Sequence[ItemTrace]) -> None:
        """A batch came back from the device."""

    def answered(self, trace: ItemTrace, future: Future[Embedding]) -> None:
        """An item left: with its vector, with an error, or cancelled because nobody waits for it any more."""


ITEM_TRACES: ContextVar[list[ItemTrace] | None] = ContextVar("traces", default=None)


def begin_trace(item: EmbeddingItem, estimated_tokens: int) -> ItemTrace:
    """The trace of an item just admitted; whoever listens in this context gets to know it."""
    trace = ItemTrace(item_kind(item), estimated_tokens, time.monotonic())
    if (traces := ITEM_TRACES.get()) is not None:
        traces.append(trace)
    return trace


def item_kind(item: EmbeddingItem) -> Kind:
    """What an item is made of; `mixed` where its parts are not all of one kind."""
    kinds = {_KIND_OF_PART[type(part)] for part in item.parts}
    return kinds.pop() if len(kinds) == 1 else "mixed"
