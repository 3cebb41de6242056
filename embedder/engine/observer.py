"""What the engine reports about its work: numbers and times, and nothing that callers sent.

The engine calls one `Observer`, which the metrics implement. Code that wants the traces of one request's items, as
tracing does, sets `ITEM_TRACES` around the request. All times are seconds of `time.monotonic`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError
from embedder.inputs.decoder_process import EndReason
from embedder.inputs.items import EmbeddingItem, Image, Part, Text, Video
from embedder.inputs.preprocess import ModelInput

ItemOutcome = Embedding | ModelInput | EmbedderError | None  # a ModelInput is that of a query
Kind = Literal["text", "image", "video", "mixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_KIND_OF_PART: dict[type[Part], Kind] = {Text: "text", Image: "image", Video: "video"}


@dataclass(frozen=True)
class Batch:
    """Measurements of items that ran together. `num_tokens` is their cost as the scheduler counts it."""

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
    """The stages of one item. Times of stages that it has not reached are None, counts 0.

    `num_tokens` counts text and visual tokens; the first `num_prefix_tokens` of them may be shared with other items.
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

    def count_tokens(self, model_input: ModelInput) -> None:
        """Record the numbers of tokens that preprocessing found."""
        self.num_tokens = model_input.num_tokens
        self.num_visual_tokens = len(model_input.visual_index)
        self.num_prefix_tokens = model_input.num_prefix_tokens
        self.num_cut_tokens = model_input.num_cut_tokens


class Observer:
    """Callbacks for the stages of items. The engine's threads wait for them. This base class does nothing."""

    def admitted(self, traces: Sequence[ItemTrace]) -> None:
        """Items entered the queue."""

    def ran(self, batch: Batch, traces: Sequence[ItemTrace]) -> None:
        """A batch was computed."""

    def encoded(self, num_reused: int, num_encoded: int) -> None:
        """Images and clips of a batch: those whose features the vision cache had, and those that were encoded."""

    def resolved(self, outcomes: Sequence[tuple[ItemTrace, ItemOutcome]]) -> None:
        """Items left the queue: with an embedding, with an error, or (None) cancelled by their caller.

        If preprocessing failed, the trace has no tokens.
        """

    def decoder_ended(self, reason: EndReason) -> None:
        """A decoding process was killed or ended by itself; another one takes its place when it is needed."""


ITEM_TRACES: ContextVar[list[ItemTrace] | None] = ContextVar("traces", default=None)


def begin_trace(item: EmbeddingItem, estimated_tokens: int) -> ItemTrace:
    """Create the trace of an item that was just admitted, and add it to `ITEM_TRACES` if that is set."""
    trace = ItemTrace(item_kind(item), estimated_tokens, time.monotonic())
    if (traces := ITEM_TRACES.get()) is not None:
        traces.append(trace)
    return trace


def item_kind(item: EmbeddingItem) -> Kind:
    """The kind of the item's parts; `mixed` if they differ."""
    kinds = {_KIND_OF_PART[type(part)] for part in item.parts}
    return kinds.pop() if len(kinds) == 1 else "mixed"
