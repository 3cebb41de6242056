"""What decoding reads of the settings: limits on images and videos, and whether pictures are turned upright.

A decoding process gets only these.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, Self

from embedder.errors import MediaTooLarge


class TooLittleMemory(MediaTooLarge):
    """Decoding takes more memory than it may use."""


class MediaLimits(Protocol):
    """What decoding reads of the settings."""

    @property
    def max_image_bytes(self) -> int: ...
    @property
    def max_image_pixels(self) -> int: ...
    @property
    def max_video_bytes(self) -> int: ...
    @property
    def decode_timeout_s(self) -> float: ...
    @property
    def raw_orientation(self) -> bool: ...


@dataclass(frozen=True)
class FixedLimits:
    """The limits without the settings, which take time to import and hold keys."""

    max_image_bytes: int
    max_image_pixels: int
    max_video_bytes: int
    decode_timeout_s: float
    raw_orientation: bool

    @classmethod
    def of(cls, limits: MediaLimits) -> Self:
        """A copy of the limits."""
        return cls(
            limits.max_image_bytes,
            limits.max_image_pixels,
            limits.max_video_bytes,
            limits.decode_timeout_s,
            limits.raw_orientation,
        )


def check_num_pixels(what: str, width: int, height: int, limits: MediaLimits) -> None:
    """Raises `MediaTooLarge` if `what`, an image, a video or a page, has more pixels than `max_image_pixels`."""
    if width * height > limits.max_image_pixels:
        raise MediaTooLarge(
            f"{what} of {width}x{height} = {width * height} pixels; "
            f"allowed: up to {limits.max_image_pixels} (EMBEDDER_MAX_IMAGE_PIXELS)"
        )


def decode_deadline(limits: MediaLimits) -> float:
    """The time at which decoding that starts now must be finished, on the clock of `time.monotonic`."""
    return time.monotonic() + limits.decode_timeout_s


def check_deadline(deadline: float, limits: MediaLimits) -> None:
    """Raises `MediaTooLarge` after the deadline."""
    if time.monotonic() > deadline:
        raise decoding_took_too_long(limits)


def decoding_took_too_long(limits: MediaLimits) -> MediaTooLarge:
    return MediaTooLarge(
        f"decoding took more than {limits.decode_timeout_s:g} s (EMBEDDER_DECODE_TIMEOUT_S); "
        "send smaller or fewer images"
    )
