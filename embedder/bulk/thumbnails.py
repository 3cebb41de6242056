"""A small picture of a row, for pages that show results."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import PIL.Image

from embedder.errors import EmbedderError
from embedder.inputs.decoder import Decoder, repeated_if_killed
from embedder.inputs.decoder_process import decoder_for_one_item
from embedder.inputs.image import load_image
from embedder.inputs.items import Media, Video
from embedder.inputs.limits import decode_deadline
from embedder.inputs.picture import encoded_bytes
from embedder.inputs.regimes import CheckpointRegime, Regime
from embedder.inputs.video import frames_of_segment
from embedder.settings import Settings

THUMBNAIL_PIXELS = 256 * 256
JPEG_QUALITY = 85
_SMALL = CheckpointRegime(max_pixels=THUMBNAIL_PIXELS)


def make_thumbnail(fields: Mapping[str, Any], settings: Settings) -> bytes | None:
    """JPEG of a row's image, or of the first frame of its video; None if it cannot be decoded."""
    image = fields.get("image")
    try:
        if isinstance(image, PIL.Image.Image):
            step = _SMALL.resize_image(image.height, image.width)
            return to_jpeg(image.resize((step.width, step.height), PIL.Image.Resampling.LANCZOS))
        return to_jpeg(load_picture(fields["video"] if image is None else image, _SMALL, settings))
    except EmbedderError:
        return None  # the row has this error too, from embedding it


def load_picture(source: Media | Video, regime: Regime, settings: Settings) -> PIL.Image.Image:
    """An image, or the first frame of a clip, as the regime resizes images. Raises `InvalidMedia` and `MediaTooLarge`.

    What is not simple to decode is decoded in a process of its own.
    """

    def load() -> PIL.Image.Image:
        with decoder_for_one_item(settings) as decoder:
            if isinstance(source, Video):
                return load_frame(source, regime, settings, decoder)
            return PIL.Image.fromarray(load_image(source, regime, settings, decoder=decoder))

    return repeated_if_killed(load)


def load_frame(video: Video, regime: Regime, settings: Settings, decoder: Decoder) -> PIL.Image.Image:
    """The first frame of a clip or segment, resized as an image. Raises `InvalidMedia` and `MediaTooLarge`."""
    assert not isinstance(video.source, tuple)
    data = encoded_bytes(video.source, "video", settings.max_video_bytes)
    with decoder.open_clip(data, settings, decode_deadline(settings)) as clip:
        first = frames_of_segment(clip.num_frames, clip.fps, video.segment).start
        (values,) = (frame.copy() for frame in clip.decode([first]))
    step = regime.resize_image(*values.shape[:2])
    return PIL.Image.fromarray(values).resize((step.width, step.height), PIL.Image.Resampling.LANCZOS)


def to_jpeg(image: PIL.Image.Image) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
