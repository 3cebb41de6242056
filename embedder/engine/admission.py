"""Decides which items enter the queue: limits per item, the queue's limit in tokens, and reservations of requests.

Admission comes before preprocessing, so it counts estimated tokens.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

from embedder.engine.callers import EVERYONE, SharedCapacity
from embedder.engine.postprocess import MIN_DIMENSIONS
from embedder.engine.priority import QUEUE_SHARE, delay_of
from embedder.engine.scheduler import NO_DELAY, Delay, Rate
from embedder.errors import InputTooLong, Overloaded, RequestTooLarge, UnsupportedDimensions
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.preprocess import MAX_PREFIX_TOKENS
from embedder.settings import Settings

TEMPLATE_TOKENS = 30  # the chat template with a short instruction
CHARS_PER_TOKEN = 4
TOKENS_PER_IMAGE = 300
TOKENS_PER_VIDEO = 7680  # of the longest encoded clip: 7,864,320 pixels, 32 * 32 * 2 of them a token


def check_item(item: EmbeddingItem, settings: Settings, hidden_size: int) -> None:
    """Check what depends on the settings or the model. Raises `UnsupportedDimensions` and `InputTooLong`."""
    check_dimensions(item.dimensions, hidden_size)
    check_num_chars(item, settings)


def check_num_chars(item: EmbeddingItem, settings: Settings) -> None:
    """Raise `InputTooLong` for a text or an instruction of more characters than `EMBEDDER_MAX_TEXT_CHARS`."""
    num_chars = sum([len(part.text) for part in item.parts if isinstance(part, Text)])
    for name, count in (("text", num_chars), ("instruction", len(item.instruction or ""))):
        if count > settings.max_text_chars:
            is_cut = name == "text" and item.truncate != "none"
            raise InputTooLong(
                f"{name} of {count} characters; allowed: up to {settings.max_text_chars} (EMBEDDER_MAX_TEXT_CHARS)"
                + ("; truncation does not apply above this limit" if is_cut else "")
            )


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raise `UnsupportedDimensions` unless `dimensions` is None or a size to which a row can be cut."""
    smallest = min(MIN_DIMENSIONS, hidden_size)
    if dimensions is not None and not smallest <= dimensions <= hidden_size:
        raise UnsupportedDimensions(
            f"dimensions: got {reprlib.repr(dimensions)}; allowed: a whole number from {smallest} to {hidden_size}"
        )


def estimate_tokens(item: EmbeddingItem, settings: Settings) -> int:
    """Estimate an item's tokens before anything is decoded: at most `max_input_tokens`, to which items are cut."""
    estimate = TEMPLATE_TOKENS
    if (num_tokens := len(item.instruction or "") // CHARS_PER_TOKEN) > MAX_PREFIX_TOKENS:
        estimate += num_tokens  # those of a shorter instruction are computed once for many items
    for part in item.parts:
        match part:
            case Text():
                estimate += len(part.text) // CHARS_PER_TOKEN
            case Image():
                estimate += TOKENS_PER_IMAGE
            case Video():
                is_frames = isinstance(part.source, tuple)
                estimate += TOKENS_PER_IMAGE * len(part.source) if is_frames else TOKENS_PER_VIDEO
    return min(estimate, settings.max_input_tokens)


def estimate_request_tokens(items: Sequence[EmbeddingItem], settings: Settings) -> int:
    """Estimate the tokens of a request. Raises `RequestTooLarge` if several items exceed even an empty queue."""
    num_tokens = sum(estimate_tokens(item, settings) for item in items)
    if len(items) > 1 and num_tokens > settings.max_queued_tokens:
        raise RequestTooLarge(
            f"the items are about {num_tokens} tokens; allowed: up to {settings.max_queued_tokens} in one request "
            "(EMBEDDER_MAX_QUEUED_TOKENS)"
        )
    return num_tokens


@dataclass
class Reservation:
    """Capacity of the queue that a request holds until it has submitted its items.

    `delay`: how much longer its items wait than others.
    """

    num_tokens: int  # not yet used by a submitted item
    delay: Delay = NO_DELAY
    caller: str = EVERYONE


class Admission:
    """Counts the queue's estimated tokens and measures how fast it drains. The engine calls it under its lock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tokens = SharedCapacity(settings.max_queued_tokens)  # of items without a result, and of reservations
        self._num_items = 0
        self._drain_rate = Rate(seconds_per_token=0.001)
        self._measured_s = 0.0  # when an item left last, or when the first one entered an empty queue

    @property
    def pending_tokens(self) -> int:
        """Tokens in the queue."""
        return self._tokens.used

    def has_capacity(self, num_tokens: int, priority: int = 0, caller: str = EVERYONE) -> bool:
        """True if this many tokens may enter. An empty queue accepts any number: an item may exceed the limit."""
        tokens = self._tokens
        if not tokens.used:
            return True
        share = QUEUE_SHARE if priority > 0 else 1.0
        return tokens.used + num_tokens <= share * tokens.capacity and tokens.fits(caller, num_tokens)

    def admit(self, num_tokens: int, reservation: Reservation | None, now_s: float, caller: str = EVERYONE) -> None:
        """Count one item, from the reservation if there is one. Raises `Overloaded` if the queue is full."""
        if reservation:
            reservation.num_tokens -= num_tokens
        else:
            self._add_tokens(num_tokens, 0, caller)
        if not self._num_items:
            self._measured_s = now_s
        self._num_items += 1

    def release(self, items: Sequence[tuple[str, int]], *, num_cancelled_tokens: int, now_s: float) -> None:
        """Count items that leave, by caller and tokens. `num_cancelled_tokens` of all were not computed."""
        before = self._tokens.used
        for caller, num_tokens in items:
            self._tokens.add(caller, -num_tokens)
        self._num_items -= len(items)
        self._drain_rate.add(before - self._tokens.used - num_cancelled_tokens, now_s - self._measured_s)
        self._measured_s = now_s

    def reserve(self, num_tokens: int, now_s: float = 0.0, priority: int = 0, caller: str = EVERYONE) -> Reservation:
        """Hold capacity for a request. Raises `Overloaded` if the queue does not have it now."""
        if num_tokens:
            self._add_tokens(num_tokens, priority, caller)
        return Reservation(num_tokens, delay_of(priority, self._settings.request_timeout_s, now_s), caller)

    def release_reservation(self, reservation: Reservation) -> None:
        """Free the part of a reservation that no item has used."""
        self._tokens.add(reservation.caller, -reservation.num_tokens)

    def _add_tokens(self, num_tokens: int, priority: int, caller: str) -> None:
        if not self.has_capacity(num_tokens, priority, caller):
            whose, allowed = "", f"up to {self._settings.max_queued_tokens} (EMBEDDER_MAX_QUEUED_TOKENS)"
            if priority > 0:
                allowed += "; requests with a `priority` above 0 may fill only half of that"
            elif self._tokens.used + num_tokens <= self._tokens.capacity:
                whose = " for this API key"
                allowed += (
                    f"; {self._tokens.used_by(caller)} of the tokens that wait are of this API key, which may have up "
                    f"to {self._tokens.allowed(caller)} now, so that others are not refused"
                )
            raise Overloaded(
                f"the queue is full{whose}: {self.pending_tokens} tokens wait, and this request has about "
                f"{num_tokens}; allowed: {allowed}",
                retry_after_s=self._retry_after_s(),
            )
        self._tokens.add(caller, num_tokens)

    def _retry_after_s(self) -> float:
        """Seconds until the queue has drained, at least 1, at most the time limit of a request.

        The upper bound matters after many cancellations, which make the queue look slow.
        """
        drained_s = self.pending_tokens * self._drain_rate.seconds_per_token
        return max(1.0, min(drained_s, self._settings.request_timeout_s))
