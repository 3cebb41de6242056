"""A small picture of a row, for pages that show results."""

from __future__ import annotations

import io
from typing import Any

import PIL.Image

from embedder.errors import EmbedderError
from embedder.inputs.decoder_process import decoder_for_one_item
from embedder.inputs.image import load_image
from embedder.inputs.regimes import CheckpointRegime
from embedder.settings import Settings

THUMBNAIL_PIXELS = 256 * 256
JPEG_QUALITY = 85
_SMALL = CheckpointRegime(max_pixels=THUMBNAIL_PIXELS)


def make_thumbnail(image: Any, settings: Settings) -> bytes | None:
    """JPEG of an image, which is a PIL image or the bytes of a file; None if it cannot be decoded."""
    try:
        if not isinstance(image, PIL.Image.Image):
            with decoder_for_one_item(settings) as decoder:
                image = PIL.Image.fromarray(load_image(image, _SMALL, settings, decoder=decoder))
        else:
            step = _SMALL.resize_image(image.height, image.width)
            image = image.resize((step.width, step.height), PIL.Image.Resampling.LANCZOS)
    except EmbedderError:
        return None  # the row has this error too, from embedding it
    return to_jpeg(image)


def to_jpeg(image: PIL.Image.Image) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
