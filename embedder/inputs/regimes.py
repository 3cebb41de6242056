"""The two preprocessing regimes: the size of each image and frame, the filter that resizes it, the frames of a video.

    checkpoint  what the checkpoint's own processor files say, computed as transformers' Qwen3VLProcessor does
    reference   what the authors' script does (QwenLM/Qwen3-VL-Embedding 8ce3aab with qwen-vl-utils 0.0.14)

Everything here is a pure function of sizes and metadata, without torch or transformers, so that a process that only
decodes can import it. docs/quality.md lists the decisions where an original fails or has a fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from embedder.errors import InvalidMedia

RegimeName = Literal["checkpoint", "reference"]
Filter = Literal["pillow", "uint8", "float32"]  # see `resample`

MAX_ASPECT_RATIO = 200  # above it both originals raise
LIST_FPS = 2.0  # of a list of frames whose rate is not given; qwen-vl-utils' `fetch_video`


@dataclass(frozen=True)
class Resize:
    """One step of resizing: height and width in pixels afterwards, and the filter."""

    height: int
    width: int
    filter: Filter


@dataclass(frozen=True)
class Sampling:
    """The frames to use, an even number: their `indices` in the video, in order, and the time of each in seconds.

    `num_resized`: how many frames share the bounds of a whole video. It is odd where the original resizes an odd number
    of frames and repeats the last one afterwards.
    """

    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    num_resized: int


class Regime(Protocol):
    """How images and frames are resized, and which frames of a video are used.

    `factor`: side length of one visual token in pixels. `min_pixels`, `max_pixels`: bounds of an image's area.
    `max_frames`: limit on the frames of a video.
    """

    @property
    def name(self) -> RegimeName: ...
    @property
    def factor(self) -> int: ...
    @property
    def min_pixels(self) -> int: ...
    @property
    def max_pixels(self) -> int: ...
    @property
    def max_frames(self) -> int: ...

    def resize_image(self, height: int, width: int) -> Resize:
        """The step for an image. Raises `InvalidMedia` for an aspect ratio above 200."""

    def resize_frame(self, height: int, width: int, num_frames: int, *, is_list: bool) -> tuple[Resize, ...]:
        """The steps for each of `num_frames` frames (`Sampling.num_resized`).

        Raises `InvalidMedia` for an aspect ratio above 200.
        """

    def sample_encoded(self, num_frames: int, fps: float, sample_fps: float | None) -> Sampling:
        """Frames of an encoded video that has `fps`: `sample_fps` per second; None: the regime's own number."""

    def sample_list(self, num_frames: int, fps: float | None) -> Sampling:
        """Frames of a list that has `fps`; None: 2. Raises `InvalidMedia` if the list has none or too many."""


@dataclass(frozen=True)
class CheckpointRegime:
    """Sizes and frames as transformers' image and video processors choose them with the checkpoint's configuration.

    `clip_min_pixels`, `clip_max_pixels`: bounds of all frames of a video together. `max_frame_tokens`: bound of one
    frame (the processor's `cap_pixels_per_frame` and `max_video_tokens`). `frame_max_pixels`: EMBEDDER_MAX_PIXELS.
    The defaults are those of the published checkpoints.
    """

    factor: int = 32
    min_pixels: int = 4096
    max_pixels: int = 1_310_720
    clip_min_pixels: int = 4096
    clip_max_pixels: int = 25_165_824
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    max_frame_tokens: int | None = None
    frame_max_pixels: int | None = None
    name: RegimeName = "checkpoint"

    def resize_image(self, height: int, width: int) -> Resize:
        _check_aspect_ratio("image", height, width)
        return Resize(*self._fit(height, width, self.min_pixels, self.max_pixels), "uint8")

    def resize_frame(self, height: int, width: int, num_frames: int, *, is_list: bool) -> tuple[Resize, ...]:
        max_pixels = self.clip_max_pixels
        if self.max_frame_tokens is not None:
            cap = min(self.max_frame_tokens * self.factor**2, self.clip_max_pixels // num_frames)
            max_pixels = max(cap, int(self.clip_min_pixels * 1.05)) * num_frames
        if self.frame_max_pixels is not None:
            max_pixels = max(min(max_pixels, self.frame_max_pixels * num_frames), self.clip_min_pixels)
        scale = max(self.factor / height, self.factor / width)
        if scale > 1:
            height, width = int(height * scale), int(width * scale)
        _check_aspect_ratio("video", height, width)
        return (Resize(*self._fit(height, width, self.clip_min_pixels, max_pixels, num_frames), "uint8"),)

    def sample_encoded(self, num_frames: int, fps: float, sample_fps: float | None) -> Sampling:
        wanted = max(int(num_frames / fps * (sample_fps or self.fps)), self.min_frames)
        count = min(wanted, self.max_frames, num_frames)
        return self._sampling([int(index) for index in np.linspace(0, num_frames - 1, count).round()], fps)

    def sample_list(self, num_frames: int, fps: float | None) -> Sampling:
        if not 1 <= num_frames <= self.max_frames:
            raise InvalidMedia(f"video of {num_frames} frames; allowed: 1 to {self.max_frames}")
        return self._sampling(list(range(num_frames)), fps or LIST_FPS)

    def _sampling(self, indices: list[int], fps: float) -> Sampling:
        num_resized = max(2, len(indices))  # transformers refuses a single frame; it counts as two here
        return Sampling(*_repeat_odd(indices, fps), num_resized)

    def _fit(self, height: int, width: int, min_pixels: int, max_pixels: int, num_frames: int = 1) -> tuple[int, int]:
        """The multiples of `factor` whose area, over all frames, is between the bounds."""
        factor = self.factor
        counted = num_frames if num_frames == 1 else round(num_frames / 2) * 2  # rounds 5 to 4 and 7 to 8
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        if counted * new_height * new_width > max_pixels:
            shrink = math.sqrt(num_frames * height * width / max_pixels)
            return _floor_sides(height / shrink, width / shrink, factor)
        if counted * new_height * new_width < min_pixels:
            grow = math.sqrt(min_pixels / (num_frames * height * width))
            return _ceil_sides(height * grow, width * grow, factor)
        return new_height, new_width


@dataclass(frozen=True)
class ReferenceRegime:
    """Sizes and frames as the authors' script and qwen-vl-utils choose them. `max_pixels`: limit for an image or frame.

    An encoded video has `clip_max_pixels` in all frames together, a list of frames `list_max_pixels`.
    """

    factor: int = 32
    max_pixels: int = 1800 * 32**2
    max_frames: int = 64
    name: RegimeName = "reference"

    @property
    def min_pixels(self) -> int:
        return 4 * self.factor**2

    def resize_image(self, height: int, width: int) -> Resize:
        return Resize(*_smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels), "pillow")

    def resize_frame(self, height: int, width: int, num_frames: int, *, is_list: bool) -> tuple[Resize, ...]:
        token = self.factor**2
        total = 10 * 768 * token if is_list else 128_000 * token * 0.9  # MAX_TOTAL_PIXELS; MODEL_SEQ_LEN's default
        min_pixels = 128 * token
        if self.max_pixels < min_pixels:  # EMBEDDER_MAX_PIXELS
            min_pixels = self.min_pixels
        max_pixels = min(max(min(768 * token, total / num_frames * 2), int(min_pixels * 1.05)), self.max_pixels)
        if not is_list:
            return (Resize(*_smart_resize(height, width, self.factor, min_pixels, max_pixels), "float32"),)
        # Each frame of a list is first fetched as an image, with its factor in the place of the patch size.
        first = _smart_resize(height, width, 2 * self.factor, 16 * token, 65_536 * token)
        return Resize(*first, "pillow"), Resize(*_smart_resize(*first, self.factor, min_pixels, max_pixels), "float32")

    def sample_encoded(self, num_frames: int, fps: float, sample_fps: float | None) -> Sampling:
        wanted = max(num_frames / fps * (sample_fps or 1.0), 4)
        count = max(1, int(min(wanted, self.max_frames // 2 * 2, num_frames)) // 2 * 2)
        # float32 as in torch.linspace: float64 rounds some halves differently
        indices = np.linspace(0, num_frames - 1, count, dtype=np.float32).round()
        repeated, seconds = _repeat_odd([int(index) for index in indices], fps)
        return Sampling(repeated, seconds, len(repeated))

    def sample_list(self, num_frames: int, fps: float | None) -> Sampling:
        if num_frames < 1:
            raise InvalidMedia("video of 0 frames; allowed: at least 1")
        indices = list(range(num_frames))
        if num_frames > self.max_frames:
            indices = [int(index) for index in np.linspace(0, num_frames - 1, self.max_frames, dtype=int)]
        indices += indices[-1:] * (len(indices) % 2)
        seconds = tuple(number / (fps or LIST_FPS) for number in range(len(indices)))  # a repeated frame is later
        return Sampling(tuple(indices), seconds, len(indices))


def _repeat_odd(indices: list[int], fps: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Indices and times; an odd last frame is repeated, at the same time."""
    indices = indices + indices[-1:] * (len(indices) % 2)
    return tuple(indices), tuple(index / fps for index in indices)


def _smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """As qwen-vl-utils' function of this name, except that no side becomes 0."""
    _check_aspect_ratio("image", height, width)
    new_height, new_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return _floor_sides(height / shrink, width / shrink, factor)
    if new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return _ceil_sides(height * grow, width * grow, factor)
    return new_height, new_width


def _floor_sides(height: float, width: float, factor: int) -> tuple[int, int]:
    """Round down, to at least one factor."""
    return max(factor, math.floor(height / factor) * factor), max(factor, math.floor(width / factor) * factor)


def _ceil_sides(height: float, width: float, factor: int) -> tuple[int, int]:
    return math.ceil(height / factor) * factor, math.ceil(width / factor) * factor


def _check_aspect_ratio(kind: str, height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise InvalidMedia(
            f"{kind} of {width}x{height} pixels has an aspect ratio of {ratio:.0f}:1; "
            f"allowed: up to {MAX_ASPECT_RATIO}:1"
        )
