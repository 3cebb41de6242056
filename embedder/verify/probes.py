"""The items that every check embeds: four texts, two images, and one image with text."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.inputs.prompt import QUERY_INSTRUCTION

Vector = NDArray[np.float32]
Item = dict[str, Any]  # as in the body of POST /embed: images are base64

PUBLISHED_TEXT = (
    "A woman shares a joyful moment with her golden retriever on a sun-drenched beach at sunset, as the dog offers "
    "its paw in a heartwarming display of companionship and trust."
)


def make_image(width: int, height: int, seed: int) -> str:
    """A PNG of smooth random colors, base64-encoded."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BILINEAR).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


TEXT_PROBES: list[Item] = [
    {"text": "red"},
    {"text": "red", "instruction": QUERY_INSTRUCTION},
    {"text": "\u732b\u306f\u8d64\u3044 \U0001f7e5 e\u0301\n\n- a list:\n"},
    {"text": f"{PUBLISHED_TEXT}\n" * 5},
]
IMAGE_PROBES: list[Item] = [
    {"image": make_image(96, 64, 0)},
    {"image": make_image(333, 120, 1)},  # neither side is a multiple of the patch size
    {"image": make_image(64, 96, 2), "text": "what the picture shows"},
]
PROBES = TEXT_PROBES + IMAGE_PROBES
NUM_TEXT_PROBES = len(TEXT_PROBES)
