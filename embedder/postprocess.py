"""A pooled row -> the vector that was asked for: cut to `dimensions`, then brought to unit length, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedder.errors import EngineFailed, UnsupportedDimensions

MIN_DIMENSIONS = 64  # the smallest Matryoshka size the checkpoints were trained for (model card)


@dataclass(frozen=True)
class Embedding:
    """One answer. `vector`: (dimensions,) float32. `num_tokens` were embedded, `num_cut_tokens` did not fit."""

    vector: NDArray[np.float32]
    num_tokens: int
    num_cut_tokens: int


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raises `UnsupportedDimensions` unless a vector of that size can be cut from `hidden_size` values."""
    smallest = min(MIN_DIMENSIONS, hidden_size)
    is_whole = isinstance(dimensions, int) and not isinstance(dimensions, bool)
    if dimensions is not None and not (is_whole and smallest <= dimensions <= hidden_size):
        raise UnsupportedDimensions(
            f"dimensions: got {repr(dimensions)[:60]}; allowed: a whole number from {smallest} to {hidden_size}"
        )


def finish_vector(row: NDArray[np.float32], dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """(hidden_size,) -> (dimensions,). Cut first, then normalise. Raises `EngineFailed` if a value is not finite."""
    vector = row[:dimensions]
    if not np.isfinite(vector).all():
        raise EngineFailed("the model gave a value that is not finite")
    if not normalize:
        return vector
    return vector / max(np.linalg.norm(vector), np.float32(1e-12))
