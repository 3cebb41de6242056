"""Checkpoints and pictures that several tests need."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import PIL.Image
import pytest

from embedder import Embedder
from embedder.random_checkpoint import build_tokenizer, shape_config, write_checkpoint

TEXTS = list(topics.values())  # the text of Python's own help: English that every installation has


@pytest.fixture(scope="session")
def write_random(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint of the `tiny` shape, fields overridden, and gives its folder."""
    tokenizer = build_tokenizer(TEXTS[:40], vocab_size=1500)

    def write(
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        tied: bool = True,
        **options: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        config = shape_config("tiny", tokenizer, text=text, vision=vision, tie_word_embeddings=tied)
        write_checkpoint(folder, config, tokenizer, **options)
        return folder

    return write


@pytest.fixture(scope="session")
def random_checkpoint(write_random: Callable[..., Path]) -> Path:
    """One random checkpoint for tests that need any."""
    return write_random()


@pytest.fixture(scope="session")
def embedder(random_checkpoint: Path) -> Iterator[Embedder]:
    """Random weights, float32, CPU."""
    with Embedder(str(random_checkpoint), device="cpu") as embedder:
        yield embedder


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Smooth colours with some detail, different for each seed."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BILINEAR)


def encoded(image: PIL.Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Encoded bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def words(count: int, seed: int = 0) -> str:
    """`count` English words."""
    vocabulary = sorted(set(" ".join(TEXTS[:40]).split()))
    return " ".join(random.Random(seed).choices(vocabulary, k=count))
