"""The values published for Qwen3-VL-Embedding-2B in bfloat16, and the checks against them.

The published items are a query, a text, an image (demo.jpeg of the Qwen-VL assets), and the text with the image.
"""

from __future__ import annotations

import base64

import numpy as np

from embedder.embedder import Embedder
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.verify.http_service import Service
from embedder.verify.probes import PUBLISHED_TEXT, Item
from embedder.verify.results import Check, check, cosine, not_checked

PUBLISHED_MODEL = "Qwen3-VL-Embedding-2B"
PUBLISHED_QUERY = "A woman playing with her dog on a beach at sunset."
SIMILARITIES = {
    ("query", "text"): 0.78962,
    ("query", "image"): 0.71558,
    ("query", "both"): 0.72365,
    ("text", "image"): 0.76503,
    ("text", "both"): 0.84729,
    ("image", "both"): 0.82388,
}
_FIRST_OF_DEMO = (
    "-0.07178 -0.01807 0.01001 -0.00555 -0.04956 0.11035 -0.03613 -0.02600 -0.00319 -0.00607 0.04053 0.02441 0.03857"
)
IMAGE_VALUES = np.array([float(value) for value in _FIRST_OF_DEMO.split()])  # the first values of the image's vector
# A few bfloat16 steps (0.004 just below 1). A missing prompt costs far more.
MAX_SIMILARITY_ERROR = 0.01
# Three standard deviations of one value at a cosine of 0.997 in 2048 dimensions: sqrt(2 * 0.003 / 2048) = 0.0017.
MAX_VALUE_ERROR = 0.005


def check_published_values(subject: Embedder | Service, name: str, image: bytes | None) -> list[Check]:
    """Compare with the published values. `name`: the model's name. `image`: demo.jpeg; without it, texts only."""
    rows = {pair: f"published: {' * '.join(pair)}" for pair in SIMILARITIES}
    values_row = "published: first values of image"
    if PUBLISHED_MODEL not in name:
        return [not_checked(row, "not the published 2B") for row in (*rows.values(), values_row)]
    items: dict[str, Item] = {
        "query": {"text": PUBLISHED_QUERY, "instruction": QUERY_INSTRUCTION},
        "text": {"text": PUBLISHED_TEXT},
    }
    if image is not None:
        encoded = base64.b64encode(image).decode()
        items |= {"image": {"image": encoded}, "both": {"text": PUBLISHED_TEXT, "image": encoded}}
    vectors = dict(zip(items, subject.embed(items.values()), strict=True))
    checks = []
    for (left, right), expected in SIMILARITIES.items():
        if left in vectors and right in vectors:
            value = cosine(vectors[left], vectors[right])
            is_close = abs(value - expected) <= MAX_SIMILARITY_ERROR
            checks.append(check(rows[left, right], is_close, f"{value:.5f}", f"{expected} ± {MAX_SIMILARITY_ERROR}"))
    if image is None:
        reason = "needs --image, the demo.jpeg of the Qwen-VL assets"
        return [*checks, *(not_checked(row, reason) for row in (*list(rows.values())[len(checks) :], values_row))]
    first = vectors["image"][: len(IMAGE_VALUES)]
    error = float(np.abs(first - IMAGE_VALUES[: len(first)]).max())
    return [*checks, check(values_row, error <= MAX_VALUE_ERROR, f"error {error:.5f}", f"<= {MAX_VALUE_ERROR}")]
