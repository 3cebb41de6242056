"""Resizing with the filters of the two regimes, bit for bit.

    pillow   Pillow's bicubic filter, which qwen-vl-utils uses for images
    uint8    torch's bicubic filter on bytes, which transformers' processors use
    float32  torch's bicubic filter on floats, rounded, which qwen-vl-utils uses for frames of videos

The three differ by one or two in a few percent of the values. All of them smooth when they shrink.

Resized images have their channels one after the other in memory, as torch gives them: then the patches of the vision
tower are copied 16 bytes at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.inputs.regimes import Resize


def resize(image: PIL.Image.Image | NDArray[np.uint8], steps: Iterable[Resize]) -> NDArray[np.uint8]:
    """Resize an RGB image step by step -> (height, width, 3) uint8."""
    for step in steps:
        size = image.size if isinstance(image, PIL.Image.Image) else image.shape[1::-1]
        if step.filter == "pillow":
            source = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
            image = source.resize((step.width, step.height), PIL.Image.Resampling.BICUBIC)
        elif size != (step.width, step.height):
            image = _by_torch(np.asarray(image), step)
    return _by_channel(image) if isinstance(image, PIL.Image.Image) else image


def _by_channel(image: PIL.Image.Image) -> NDArray[np.uint8]:
    """The values of an RGB image, (height, width, 3)."""
    planes = np.empty((3, image.height, image.width), np.uint8)
    for plane, channel in zip(planes, "RGB", strict=True):
        plane[:] = np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(plane.shape)
    return planes.transpose(1, 2, 0)


def _by_torch(values: NDArray[np.uint8], step: Resize) -> NDArray[np.uint8]:
    """As `resize` of torchvision's transforms (bytes: v2, floats: v1), without loading torchvision, which takes 2 s."""
    import torch

    def interpolate(images: torch.Tensor) -> torch.Tensor:
        size = [step.height, step.width]
        return torch.nn.functional.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)

    source = torch.from_numpy(np.require(values, requirements=["C", "W"])).permute(2, 0, 1)  # torch warns of others
    with torch.inference_mode(), _one_openmp_thread():
        if step.filter == "uint8":
            resized = interpolate(source[None])[0].contiguous()
        else:
            resized = torch.empty((3, step.height, step.width), dtype=torch.uint8)
            for channel in range(3):  # one at a time takes a third of the memory
                plane = interpolate(source[None, None, channel].float())
                resized[channel] = plane[0, 0].clamp_(0, 255).round_()
    return resized.permute(1, 2, 0).numpy()


@contextmanager
def _one_openmp_thread() -> Iterator[None]:
    """Keep OpenMP from creating a team of threads for this thread, in which images are resized next to others."""
    import torch

    num_threads = torch.get_num_threads()  # also ends torch's own setup of this thread, which would undo the next line
    set_num_threads = _omp_set_num_threads()
    if set_num_threads is None:
        yield
        return
    set_num_threads(1)
    try:
        yield
    finally:
        set_num_threads(num_threads)


@cache
def _omp_set_num_threads() -> Callable[[int], None] | None:
    """OpenMP's function; None if torch is built without OpenMP, or with one that is not visible. Needs torch loaded."""
    return getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
