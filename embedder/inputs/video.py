"""An encoded video or a list of frames -> sampled RGB frames, upright and resized, and the time of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from embedder.inputs.decoder import Decoder, OpenClip, OpenImage
from embedder.inputs.frames import Clip, FrameCollector
from embedder.inputs.items import Media, Video
from embedder.inputs.limits import decode_deadline
from embedder.inputs.picture import encoded_bytes
from embedder.inputs.regimes import Regime, Sampling
from embedder.settings import Settings


def load_video(
    video: Video, regime: Regime, settings: Settings, deadline: float | None = None, decoder: Decoder | None = None
) -> Clip:
    """Decode the sampled frames of a video, upright and resized for the model, with their times.

    `deadline` defaults to `decode_timeout_s` from now, `decoder` to one that decodes in this thread. Raises
    `InvalidMedia`, `MediaTooLarge` and `InputTooLong`.
    """
    deadline = decode_deadline(settings) if deadline is None else deadline
    decoder = decoder or Decoder()
    if isinstance(video.source, tuple):
        images, collector = _open_frames(video.source, video.fps, regime, settings, deadline, decoder)
        return _decode_frames(images, collector)
    data = encoded_bytes(video.source, "video", settings.max_video_bytes)
    with decoder.open_clip(data, settings, deadline) as clip:
        collector, first = _sample_clip(clip, video, regime, settings)
        for values in clip.decode([first + index for index in collector.sampling.indices]):
            collector.append(values)
        return collector.clip()


def measure_video(
    video: Video, regime: Regime, settings: Settings, deadline: float, decoder: Decoder
) -> tuple[tuple[int, int], Sampling]:
    """Height and width of the frames that `load_video` gives, turned or not, and their sampling. Decodes none."""
    if isinstance(video.source, tuple):
        _, collector = _open_frames(video.source, video.fps, regime, settings, deadline, decoder)
    else:
        data = encoded_bytes(video.source, "video", settings.max_video_bytes)
        with decoder.open_clip(data, settings, deadline) as clip:
            collector, _ = _sample_clip(clip, video, regime, settings)
    return collector.expected_size, collector.sampling


def _open_frames(
    sources: Sequence[Media],
    fps: float | None,
    regime: Regime,
    settings: Settings,
    deadline: float,
    decoder: Decoder,
) -> tuple[dict[int, OpenImage], FrameCollector]:
    sampling = regime.sample_list(len(sources), fps)
    images = {
        index: decoder.open_image(sources[index], settings, deadline) for index in dict.fromkeys(sampling.indices)
    }
    collector = FrameCollector(regime, sampling, is_list=True, max_tokens=settings.max_input_tokens)
    collector.check_num_tokens(images[0].height, images[0].width)
    return images, collector


def _decode_frames(images: dict[int, OpenImage], collector: FrameCollector) -> Clip:
    for index in collector.sampling.indices:
        image = images.pop(index, None)
        if image is None:
            collector.repeat()
        else:
            collector.append(image.decode())
        del image  # frees its pixels
    return collector.clip()


def frames_of_segment(num_frames: int, fps: float, segment: tuple[float, float] | None) -> range:
    """The frames that start in the segment (None: all); at least one. A frame's time is its number divided by `fps`."""
    if segment is None:
        return range(num_frames)
    start, end = (math.ceil(seconds * fps - 1e-3) for seconds in segment)
    first = min(start, num_frames - 1)
    return range(first, max(first + 1, min(end, num_frames)))


def _sample_clip(clip: OpenClip, video: Video, regime: Regime, settings: Settings) -> tuple[FrameCollector, int]:
    """The collector of the sampled frames, and the number of the frame from which they are counted."""
    frames = frames_of_segment(clip.num_frames, clip.fps, video.segment)
    sampling = regime.sample_encoded(len(frames), clip.fps, video.fps)
    collector = FrameCollector(regime, sampling, is_list=False, max_tokens=settings.max_input_tokens)
    collector.check_num_tokens(clip.height, clip.width)
    return collector, frames.start
