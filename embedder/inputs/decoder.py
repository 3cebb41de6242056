"""Opens and decodes images and clips in the calling thread. `decoder_process` does the same in a separate process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.errors import InvalidMedia
from embedder.inputs import clip, structure
from embedder.inputs.items import Media
from embedder.inputs.limits import MediaLimits
from embedder.inputs.picture import decode_image, decode_peak_bytes, encoded_bytes, open_image

# Of one image in a thread. Larger ones are decoded in a process, where memory is reserved first. A photo of 16
# megapixels passes, a progressive one of 12, a WebP of 6.
THREAD_BYTES = 2**27

Result = TypeVar("Result")


class NeedsProcess(Exception):
    """The bytes may take longer, or more memory, than a thread may use. `num_bytes`: the memory; 0 if not known."""

    def __init__(self, num_bytes: int = 0) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


class ProcessKilled(InvalidMedia):
    """Somebody has killed the process that decoded the item: most often the kernel, because memory was short."""


def repeated_if_killed(task: Callable[[], Result]) -> Result:
    """What the task returns. If somebody has killed its process, it is done once more, in another one."""
    try:
        return task()
    except ProcessKilled:
        return task()


class OpenImage(Protocol):
    """An image whose header is read and within the limits."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    def decode(self) -> PIL.Image.Image:
        """Decode the pixels to RGB, upright unless `raw_orientation` is set; `width` and `height` are as stored."""


class OpenClip(Protocol):
    """A video whose packets are read. `fps`: frames per second."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def fps(self) -> float: ...
    def decode(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Decode the frames of these indices, ascending -> (height, width, 3) each, valid until the next one."""


@dataclass(frozen=True)
class ThreadImage:
    """An image that is decoded in the calling thread."""

    image: PIL.Image.Image
    is_raw: bool

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def decode(self) -> PIL.Image.Image:
        return decode_image(self.image, is_raw=self.is_raw)


class Decoder:
    """Decodes everything in the calling thread, however long it takes. For bytes that the program trusts."""

    def open_image(self, source: Media, limits: MediaLimits, deadline: float) -> OpenImage:
        """Read an image's header. Raises `InvalidMedia` and `MediaTooLarge`, as do all methods."""
        return ThreadImage(open_image(source, limits, deadline), limits.raw_orientation)

    def open_clip(self, data: bytes, limits: MediaLimits, deadline: float) -> AbstractContextManager[OpenClip]:
        """Read a video's packets."""
        return clip.open_clip(data, limits, deadline)


class ThreadDecoder(Decoder):
    """Decodes in the calling thread what takes a bounded time and little memory. Raises `NeedsProcess` otherwise."""

    def open_image(self, source: Media, limits: MediaLimits, deadline: float) -> OpenImage:
        if isinstance(source, PIL.Image.Image):  # an object of the program, not bytes of a caller
            return super().open_image(source, limits, deadline)
        data = encoded_bytes(source, "image", limits.max_image_bytes)
        if structure.is_bounded(data):
            image = open_image(data, limits, deadline)
            if (num_bytes := decode_peak_bytes(image, data)) <= THREAD_BYTES:
                return ThreadImage(image, limits.raw_orientation)
            return self.open_large_image(data, num_bytes, limits, deadline)
        return self.open_large_image(data, 0, limits, deadline)

    def open_large_image(self, data: bytes, num_bytes: int, limits: MediaLimits, deadline: float) -> OpenImage:
        """Open an image that may not be decoded here. `num_bytes`: the memory it needs; 0 if not known."""
        raise NeedsProcess(num_bytes)

    def open_clip(self, data: bytes, limits: MediaLimits, deadline: float) -> AbstractContextManager[OpenClip]:
        raise NeedsProcess
