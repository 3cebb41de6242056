"""A pooled row to the vector that the caller asked for: cut to `dimensions`, normalized, and quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pybase64
from numpy.typing import NDArray

from embedder.errors import EngineFailed, InvalidRequest

OutputDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

MIN_DIMENSIONS = 64  # the smallest Matryoshka size that the checkpoints were trained for (model card)
# int8 covers this many times 1 / sqrt(dimensions), the root mean square of a unit vector's values. The largest of the
# first values that are published for the 2B model's demo image is 5 times that. At 12 the cosine changes by < 0.001.
INT8_RANGE = 12.0


class Embedding(NamedTuple):
    """The result for one item.

    `vector`: (dimensions,) float32. `num_tokens`: tokens of the sequence that was embedded. `num_cut_tokens`: tokens
    of the item's text that were truncated. `num_visual_tokens`: how many of the tokens stand for images and videos.
    `is_cached`: the row came from the cache or from a coalesced item.
    """

    vector: NDArray[np.float32]
    num_tokens: int
    num_cut_tokens: int
    num_visual_tokens: int = 0
    is_cached: bool = False


def check_output_dtype(output_dtype: OutputDtype, normalize: bool) -> None:
    """Raise `InvalidRequest` for int8 and uint8 without `normalize`: their scale is that of a unit vector."""
    if output_dtype in ("int8", "uint8") and not normalize:
        raise InvalidRequest(f"output_dtype: got {output_dtype} with normalize false; allowed: with normalize true")


def finish_vectors(
    rows: Sequence[NDArray[np.float32]] | NDArray[np.float32], options: Sequence[tuple[int | None, bool]]
) -> list[NDArray[np.float32] | EngineFailed]:
    """Cut each of the rows to its `dimensions`, then normalize it if it is to be.

    `options` are each row's (dimensions, normalize). A row with a value that is not finite gives an `EngineFailed`. A
    vector does not depend on the other rows. Rows with equal options are computed in one numpy call: each call may
    release the GIL to another thread.
    """
    finished: dict[int, NDArray[np.float32] | EngineFailed] = {}
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, (dimensions, normalize) in enumerate(options):
        groups.setdefault((len(rows[place][:dimensions]), normalize), []).append(place)
    for (dimensions, normalize), places in groups.items():
        vectors = np.stack([rows[place][:dimensions] for place in places])
        with np.errstate(over="ignore", invalid="ignore"):  # such rows become errors below
            squares = np.vecdot(vectors, vectors)
            if normalize:
                vectors /= np.maximum(np.sqrt(squares), np.float32(1e-12))[:, None]
        for place, vector, is_finite in zip(places, vectors, np.isfinite(squares).tolist(), strict=True):
            finished[place] = vector if is_finite else EngineFailed(_NOT_FINITE)
    return [finished[place] for place in range(len(rows))]


_NOT_FINITE = "the model computed a value that is not finite, or far too large"


def quantize(vector: NDArray[np.float32], output_dtype: OutputDtype) -> NDArray[Any]:
    """Quantize unit vectors, (..., dimensions), to the same shape, or for binaries to (..., ceil(dimensions / 8)).

    The result depends only on the vector itself, not on a data set:

    - int8: value / `int8_step(dimensions)`, rounded, saturating at -127 and 127. uint8: the same plus 128.
    - ubinary: one bit per value, set if the value is positive; eight bits per byte, the first in the highest bit,
      padded with zeros. binary: that byte minus 128, as int8 (as in Cohere's API and sentence-transformers).

    `dequantize` is the inverse.
    """
    match output_dtype:
        case "float32":
            return vector.astype(np.float32, copy=False)
        case "float16":
            limit = np.finfo(np.float16).max
            return vector.clip(-limit, limit).astype(np.float16)
        case "int8" | "uint8":
            steps = np.rint(vector.astype(np.float64) / int8_step(vector.shape[-1])).clip(-127, 127)
            return steps.astype(np.int8) if output_dtype == "int8" else (steps + 128).astype(np.uint8)
        case "binary" | "ubinary":
            packed = np.packbits(vector > 0, axis=-1)
            return packed if output_dtype == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def dequantize(values: NDArray[Any], output_dtype: OutputDtype, dimensions: int) -> NDArray[np.float32]:
    """Convert the result of `quantize` back to float32, (..., dimensions). Binaries give only the signs, -1 and 1."""
    match output_dtype:
        case "float32" | "float16":
            return values.astype(np.float32)
        case "int8" | "uint8":
            steps = values.astype(np.float32) - (128 if output_dtype == "uint8" else 0)
            return (steps * int8_step(dimensions)).astype(np.float32)
        case "binary" | "ubinary":
            packed = values if output_dtype == "ubinary" else (values.astype(np.int16) + 128).astype(np.uint8)
            return np.unpackbits(packed, axis=-1, count=dimensions).astype(np.float32) * 2 - 1


def int8_step(dimensions: int) -> float:
    """The value that 1 stands for in int8: min(1, 12 / sqrt(dimensions)) / 127."""
    return min(1.0, INT8_RANGE / math.sqrt(dimensions)) / 127


def to_base64(vector: NDArray[Any]) -> str:
    """The values' bytes in base64, little-endian, in the dtype of the vector."""
    return pybase64.b64encode(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")
