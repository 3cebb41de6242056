"""sentence-transformers for both apps: loads a folder and returns a function from `input` to vectors."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import PIL.Image

from benchmarks.checkpoints import INSTRUCTION
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

Embed = Callable[[list[str]], list[list[float]]]


def load(folder: str, dtype: str) -> Embed:
    from sentence_transformers import SentenceTransformer

    pipeline: Any = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})

    def embed(inputs: list[str]) -> list[list[float]]:
        rows = pipeline.encode([_content(one) for one in inputs], prompt=INSTRUCTION, show_progress_bar=False)
        values: list[list[float]] = rows.tolist()
        return values

    return embed


def _content(value: str) -> str | dict[str, PIL.Image.Image]:
    if not value.startswith("data:image/"):
        return value
    data = base64.b64decode(value.partition(",")[2])
    return {"image": PIL.Image.open(io.BytesIO(data)).convert("RGB")}
