"""An encoded video or a list of frames -> sampled RGB frames, resized, and the time of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.errors import InvalidMedia
from embedder.inputs.clip import open_clip
from embedder.inputs.image import (
    ImageGeometry,
    decode_deadline,
    decode_image,
    decode_memory,
    decode_peak_bytes,
    encoded_bytes,
    open_image,
    resize,
    resized_size,
)
from embedder.inputs.items import Media, Video
from embedder.settings import Settings

FRAME_MAX_PIXELS = 768 * 32 * 32  # of one frame; the reference's FRAME_MAX_PIXELS
VIDEO_MAX_PIXELS = 10 * FRAME_MAX_PIXELS  # of all frames together; the reference's MAX_TOTAL_PIXELS
DEFAULT_LIST_FPS = 2.0  # of a list of frames; qwen-vl-utils 0.0.14, `fetch_video`
DEFAULT_SAMPLE_FPS = 1.0  # of an encoded video; the reference's FPS
MIN_SAMPLED_FRAMES = 4  # qwen-vl-utils' FPS_MIN_FRAMES; fewer if the video has fewer


@dataclass(frozen=True)
class Clip:
    """`frames`: (num_frames, height, width, 3) uint8, an even number. `seconds`: the time of each frame."""

    frames: NDArray[np.uint8]
    seconds: tuple[float, ...]


def load_video(video: Video, geometry: ImageGeometry, settings: Settings, deadline: float | None = None) -> Clip:
    """Decode a video to frames of one size, (num_frames, height, width, 3) uint8, with their times.

    An odd last frame is repeated. The size follows the reference, with these differences:

    - The area of all frames together is bounded for encoded videos too. The reference bounds it for lists of frames
      only; a minute of video would take 24,576 tokens, three times the model's context.
    - Small frames are enlarged to the model's minimum only; qwen-vl-utils enlarges them further.
    - Sides are rounded once, to multiples of the model's factor. qwen-vl-utils first rounds the frames of a list to
      multiples of 64, because it passes a factor where a patch size is expected.
    - A rotation in the container is ignored, like EXIF orientation.

    `deadline` defaults to `decode_timeout_s` from now. Raises `InvalidMedia` and `MediaTooLarge`.
    """
    deadline = decode_deadline(settings) if deadline is None else deadline
    if isinstance(video.source, tuple):
        return _load_frames(video.source, video.fps or DEFAULT_LIST_FPS, geometry, settings, deadline)
    return _load_encoded(video.source, video.fps or DEFAULT_SAMPLE_FPS, geometry, settings, deadline)


def sample_indices(num_frames: int, fps: float, sample_fps: float, max_frames: int) -> list[int]:
    """Indices of the frames to sample: `sample_fps` per second, an even number, spaced evenly from first to last.

    As qwen-vl-utils' `smart_nframes` and readers do, except that they refuse a video of a single frame.
    """
    wanted = max(num_frames / fps * sample_fps, MIN_SAMPLED_FRAMES)
    count = max(1, int(min(wanted, max_frames // 2 * 2, num_frames)) // 2 * 2)
    # float32 as in torch.linspace: float64 rounds some halves differently
    return [int(index) for index in np.linspace(0, num_frames - 1, count, dtype=np.float32).round()]


def _load_frames(
    sources: Sequence[Media], fps: float, geometry: ImageGeometry, settings: Settings, deadline: float
) -> Clip:
    if not 1 <= len(sources) <= settings.max_video_frames:
        raise InvalidMedia(f"video of {len(sources)} frames; allowed: 1 to {settings.max_video_frames}")
    images = [open_image(source, settings, deadline) for source in sources]
    images += images[-1:] * (len(images) % 2)
    sizes = [_frame_size(image.height, image.width, len(images), geometry) for image in images]
    if len(set(sizes)) > 1:  # the reference cannot stack them
        shown = ", ".join(dict.fromkeys(f"{image.width}x{image.height}" for image in images))
        raise InvalidMedia(f"video of frames of {shown[:60]} pixels; allowed: frames of one size")
    frames = np.empty((len(images), *sizes[0], 3), np.uint8)
    for row in frames:
        image = images.pop(0)
        with decode_memory.reserve(decode_peak_bytes(image)):
            row[:] = resize(decode_image(image), *sizes[0])
        del image  # frees its pixels
    # a repeated frame gets the next time, as in qwen-vl-utils
    return Clip(frames, tuple(index / fps for index in range(len(frames))))


def _frame_size(height: int, width: int, num_frames: int, geometry: ImageGeometry) -> tuple[int, int]:
    max_pixels = min(FRAME_MAX_PIXELS, VIDEO_MAX_PIXELS // num_frames * 2)
    max_pixels = max(min(max_pixels, geometry.max_pixels), geometry.min_pixels)
    return resized_size(height, width, ImageGeometry(geometry.factor, geometry.min_pixels, max_pixels))


def _load_encoded(
    source: bytes | str, sample_fps: float, geometry: ImageGeometry, settings: Settings, deadline: float
) -> Clip:
    data = encoded_bytes(source, "video", settings.max_video_bytes)
    with open_clip(data, settings, deadline) as clip:
        indices = sample_indices(clip.num_frames, clip.fps, sample_fps, settings.max_video_frames)
        indices += indices[-1:] * (len(indices) % 2)
        height, width = _frame_size(clip.height, clip.width, len(indices), geometry)
        frames = np.empty((len(indices), height, width, 3), np.uint8)
        with decode_memory.reserve(clip.num_bytes):
            for row, values in zip(frames, clip.decode(indices), strict=True):
                row[:] = resize(PIL.Image.fromarray(values), height, width)
        return Clip(frames, tuple(index / clip.fps for index in indices))
