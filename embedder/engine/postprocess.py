"""A pooled row -> the vector that was asked for: cut to `dimensions`, brought to unit length, quantized if asked."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedder.errors import EngineFailed, InvalidRequest, UnsupportedDimensions

OutputDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

MIN_DIMENSIONS = 64  # the smallest Matryoshka size the checkpoints were trained for (model card)
# int8 covers this many times 1/sqrt(dimensions), the root mean square of a unit vector's values. The largest of the
# published 2B's first values for its demo image is 5 times that; 12 leaves room, and costs a cosine below 0.001.
INT8_RANGE = 12.0


@dataclass(frozen=True)
class Embedding:
    """One answer. `vector`: (dimensions,) float32. `num_tokens` were embedded, `num_cut_tokens` did not fit.

    `is_cached`: equal content had been computed, or was being computed, for another item.
    """

    vector: NDArray[np.float32]
    num_tokens: int
    num_cut_tokens: int
    is_cached: bool = False


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raises `UnsupportedDimensions` unless a vector of that size can be cut from `hidden_size` values."""
    smallest = min(MIN_DIMENSIONS, hidden_size)
    is_whole = isinstance(dimensions, int) and not isinstance(dimensions, bool)
    if dimensions is not None and not (is_whole and smallest <= dimensions <= hidden_size):
        raise UnsupportedDimensions(
            f"dimensions: got {reprlib.repr(dimensions)}; allowed: a whole number from {smallest} to {hidden_size}"
        )


def check_output_dtype(output_dtype: OutputDtype, normalize: bool) -> None:
    """Raises `InvalidRequest` for int8 and uint8 of a vector that is not normalized: their scale is a unit vector's."""
    if output_dtype in ("int8", "uint8") and not normalize:
        raise InvalidRequest(f"output_dtype: got {output_dtype} with normalize false; allowed: with normalize true")


_NOT_FINITE = "the model gave a value that is not finite, or far too large"


def finish_vectors(
    rows: NDArray[np.float32], wanted: Sequence[tuple[int | None, bool]]
) -> list[NDArray[np.float32] | EngineFailed]:
    """(num_rows, hidden_size) -> of each row what is `wanted`, its dimensions and whether its length shall be 1.

    Cut first, then normalize. An `EngineFailed` stands for a row with a value that is not finite. A vector does not
    depend on the rows beside it; those that want the same go through numpy together, as each call there may hand the
    interpreter to another thread.
    """
    finished: dict[int, NDArray[np.float32] | EngineFailed] = {}
    for dimensions, normalize in set(wanted):
        places = [place for place, want in enumerate(wanted) if want == (dimensions, normalize)]
        vectors = rows[places, :dimensions]
        with np.errstate(over="ignore", invalid="ignore"):  # such rows are left out
            squares = np.vecdot(vectors, vectors)
            if normalize:
                vectors /= np.maximum(np.sqrt(squares), np.float32(1e-12))[:, None]
        for place, vector, is_finite in zip(places, vectors, np.isfinite(squares).tolist(), strict=True):
            finished[place] = vector if is_finite else EngineFailed(_NOT_FINITE)
    return [finished[place] for place in range(len(rows))]


def quantize(vector: NDArray[np.float32], output_dtype: OutputDtype) -> NDArray[Any]:
    """A unit vector in fewer bits, (..., dimensions) -> the same shape, or of the binaries (..., ceil(dimensions / 8)).

    The result depends on nothing but the vector itself:

    - int8: value / `int8_step(dimensions)`, rounded, saturating at -127 and 127; uint8: that plus 128.
    - ubinary: one bit a value, set where it is above zero, eight in a byte, the first in the highest bit, zeros behind
      the last; binary: that minus 128 as int8 (as Cohere and sentence-transformers).

    `dequantize` is the way back.
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
    """What `quantize` gave -> float32, (..., dimensions). Of the binaries only the signs are left: -1 and 1."""
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
    """The value of 1 in int8: min(1, 12 / sqrt(dimensions)) / 127."""
    return min(1.0, INT8_RANGE / math.sqrt(dimensions)) / 127
