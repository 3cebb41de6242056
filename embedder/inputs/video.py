"""An encoded video or a list of frames -> sampled RGB frames, upright and resized, and the time of each."""

from __future__ import annotations

from collections.abc import Sequence

from embedder.inputs.clip import open_clip
from embedder.inputs.frames import Clip, FrameCollector
from embedder.inputs.image import (
    decode_deadline,
    decode_image,
    decode_memory,
    decode_peak_bytes,
    encoded_bytes,
    open_image,
)
from embedder.inputs.items import Media, Video
from embedder.inputs.regimes import Regime
from embedder.settings import Settings


def load_video(video: Video, regime: Regime, settings: Settings, deadline: float | None = None) -> Clip:
    """Decode the sampled frames of a video, upright and resized for the model, with their times.

    `deadline` defaults to `decode_timeout_s` from now. Raises `InvalidMedia`, `MediaTooLarge` and `InputTooLong`.
    """
    deadline = decode_deadline(settings) if deadline is None else deadline
    if isinstance(video.source, tuple):
        return _load_frames(video.source, video.fps, regime, settings, deadline)
    return _load_encoded(video.source, video.fps, regime, settings, deadline)


def _load_frames(
    sources: Sequence[Media], fps: float | None, regime: Regime, settings: Settings, deadline: float
) -> Clip:
    sampling = regime.sample_list(len(sources), fps)
    images = {index: open_image(sources[index], settings, deadline) for index in dict.fromkeys(sampling.indices)}
    collector = FrameCollector(regime, sampling, is_list=True, max_tokens=settings.max_input_tokens)
    collector.check_num_tokens(images[0].height, images[0].width)
    for index in sampling.indices:
        image = images.pop(index, None)
        if image is None:
            collector.repeat()
            continue
        with decode_memory.reserve(decode_peak_bytes(image)):
            collector.append(decode_image(image, is_raw=settings.raw_orientation))
        del image  # frees its pixels
    return collector.clip()


def _load_encoded(
    source: bytes | str, sample_fps: float | None, regime: Regime, settings: Settings, deadline: float
) -> Clip:
    data = encoded_bytes(source, "video", settings.max_video_bytes)
    with open_clip(data, settings, deadline) as clip:
        sampling = regime.sample_encoded(clip.num_frames, clip.fps, sample_fps)
        collector = FrameCollector(regime, sampling, is_list=False, max_tokens=settings.max_input_tokens)
        collector.check_num_tokens(clip.height, clip.width)
        with decode_memory.reserve(clip.num_bytes):
            for values in clip.decode(sampling.indices):
                collector.append(values)
        return collector.clip()
