"""The sampled frames of one video, resized and collected in one array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.errors import InputTooLong, InvalidMedia
from embedder.inputs.regimes import Regime, Resize, Sampling
from embedder.inputs.resample import resize


@dataclass(frozen=True)
class Clip:
    """`frames`: (num_frames, height, width, 3) uint8, an even number. `seconds`: the time of each frame."""

    frames: NDArray[np.uint8]
    seconds: tuple[float, ...]


class FrameCollector:
    """Resizes the sampled frames of one video in order. The array is allocated with the first one.

    `expected_size`: height and width of the frames after resizing, which `check_num_tokens` computes.
    """

    def __init__(self, regime: Regime, sampling: Sampling, *, is_list: bool, max_tokens: int) -> None:
        self._regime = regime
        self.sampling = sampling
        self._is_list = is_list
        self._max_tokens = max_tokens
        self._first_size: tuple[int, int] | None = None  # width and height
        self._steps: tuple[Resize, ...] = ()
        self._frames = np.empty((0, 0, 0, 3), np.uint8)
        self._num_collected = 0
        self.expected_size = (0, 0)

    def check_num_tokens(self, height: int, width: int) -> None:
        """Raises `InputTooLong`, before anything is decoded, if frames of this size do not fit into an item.

        Whether the frames are turned does not matter: the number of tokens is the same.
        """
        num_frames = len(self.sampling.indices)
        last = self._steps_for(height, width)[-1]
        self.expected_size = last.height, last.width
        num_tokens = num_frames // 2 * last.height * last.width // self._regime.factor**2
        if num_tokens > self._max_tokens:
            raise InputTooLong(
                f"{num_tokens} tokens of a video of {num_frames} frames of {width}x{height} pixels, which cannot be "
                f"cut; allowed: {self._max_tokens} (EMBEDDER_MAX_INPUT_TOKENS). Send smaller or fewer frames (for an "
                "encoded video, a lower `fps`), or ask the operator to raise that limit or to set EMBEDDER_MAX_PIXELS, "
                "which bounds each frame, or EMBEDDER_MAX_VIDEO_FRAMES"
            )

    def append(self, image: PIL.Image.Image | NDArray[np.uint8]) -> None:
        """Resize the next frame. Raises `InvalidMedia` if it does not get the size of the first one."""
        width, height = image.size if isinstance(image, PIL.Image.Image) else image.shape[1::-1]
        steps = self._steps_for(height, width)
        if self._first_size is None:
            self._first_size, self._steps = (width, height), steps
            shape = len(self.sampling.indices), 3, steps[-1].height, steps[-1].width
            self._frames = np.empty(shape, np.uint8).transpose(0, 2, 3, 1)  # in memory as `resample` gives them
        if steps != self._steps:
            first_width, first_height = self._first_size
            sizes = f"{first_width}x{first_height}, {width}x{height}"
            raise InvalidMedia(f"video of frames of {sizes} pixels; allowed: frames of one size")
        self._frames[self._num_collected] = resize(image, steps)
        self._num_collected += 1

    def repeat(self) -> None:
        """Use the last frame once more."""
        self._frames[self._num_collected] = self._frames[self._num_collected - 1]
        self._num_collected += 1

    def clip(self) -> Clip:
        """All frames, with their times."""
        assert self._num_collected == len(self.sampling.indices)
        return Clip(self._frames, self.sampling.seconds)

    def _steps_for(self, height: int, width: int) -> tuple[Resize, ...]:
        return self._regime.resize_frame(height, width, self.sampling.num_resized, is_list=self._is_list)
