"""The items of each workload, the same for every peer and every run.

An item is {"text": ..} or {"image": JPEG bytes}. Text lengths are in tokens, without the 20 tokens of the prompt.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

Item = dict[str, Any]

SEED = 7
NUM_IMAGES = 64  # distinct images per size; they repeat
MEDIAN_WORDS, SIGMA, MAX_WORDS = 12, 0.9, 400  # short texts, with log-normal lengths and a maximum


def read_words(folder: Path) -> list[str]:
    """Words of the checkpoint's vocabulary; each is one token when preceded by a space."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = [token for token in vocabulary if token[0] == "Ġ" and len(token) > 3]
    return sorted(token[1:] for token in tokens if token[1:].isascii() and token[1:].isalpha())


def make_items(name: str, count: int, words: list[str]) -> list[Item]:
    """The first `count` items of the workload `name`."""
    rng = np.random.default_rng(SEED)
    return [WORKLOADS[name](rng, words, index) for index in range(count)]


def is_one_at_a_time(name: str) -> bool:
    """Whether the workload measures single calls instead of bulk."""
    return name == "query"


def _text(rng: np.random.Generator, words: list[str], _: int, num_tokens: int) -> Item:
    return {"text": " ".join(rng.choice(words, num_tokens))}


def _mixed_text(rng: np.random.Generator, words: list[str], index: int) -> Item:
    length = int(np.clip(rng.lognormal(np.log(MEDIAN_WORDS), SIGMA), 1, MAX_WORDS))
    return _text(rng, words, index, length)


def _image(_: np.random.Generator, __: list[str], index: int, height: int, width: int) -> Item:
    return {"image": _jpeg(index % NUM_IMAGES, height, width)}


@cache
def _jpeg(seed: int, height: int, width: int) -> bytes:
    """A JPEG of smooth colors with noise, about 1 bit per pixel as in photographs."""
    rng = np.random.default_rng([SEED, seed])
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC), np.int16)
    grainy = (smooth + rng.integers(-6, 7, smooth.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(grainy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _half(rng: np.random.Generator, words: list[str], index: int) -> Item:
    return _image(rng, words, index // 2, 448, 448) if index % 2 else _mixed_text(rng, words, index)


WORKLOADS: dict[str, Callable[[np.random.Generator, list[str], int], Item]] = {
    "query": partial(_text, num_tokens=16),
    "text-16": partial(_text, num_tokens=16),
    "text-64": partial(_text, num_tokens=64),
    "text-512": partial(_text, num_tokens=512),
    "text-2048": partial(_text, num_tokens=2048),
    "text-mixed": _mixed_text,
    "image-256": partial(_image, height=256, width=256),
    "image-448": partial(_image, height=448, width=448),
    "image-1024x1280": partial(_image, height=1024, width=1280),
    "half-half": _half,
}
