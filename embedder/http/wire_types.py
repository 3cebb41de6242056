"""Vectors as bytes in the number types of vLLM's API: float32, float16, bfloat16, and float8 in two layouts."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

EmbedDtype = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "little", "big"]  # native: little, on every machine that this service runs on


def vector_bytes(vector: NDArray[np.float32], embed_dtype: EmbedDtype, endianness: Endianness) -> bytes:
    """The values' bytes. Values between two of the type are rounded to the nearest, ties to even, and saturate."""
    match embed_dtype:
        case "float32":
            values: NDArray[Any] = vector.astype(np.float32, copy=False)
        case "float16":
            limit = np.finfo(np.float16).max
            values = vector.clip(-limit, limit).astype(np.float16)
        case "bfloat16":
            bits = vector.astype(np.float32, copy=False).view(np.uint32)
            values = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        case "fp8_e4m3" | "fp8_e5m2":
            values = _to_float8(vector, embed_dtype)
    return values.astype(values.dtype.newbyteorder(">" if endianness == "big" else "<"), copy=False).tobytes()


def _to_float8(vector: NDArray[np.float32], embed_dtype: Literal["fp8_e4m3", "fp8_e5m2"]) -> NDArray[np.uint8]:
    magnitudes = float8_magnitudes(embed_dtype)
    size = np.abs(vector).clip(0, magnitudes[-1])
    above = np.searchsorted(magnitudes, size).clip(1, len(magnitudes) - 1)
    gap_above, gap_below = magnitudes[above] - size, size - magnitudes[above - 1]
    is_below = (gap_below < gap_above) | ((gap_below == gap_above) & (above % 2 == 1))
    codes = np.where(is_below, above - 1, above).astype(np.uint8)
    return np.where(np.signbit(vector), codes + 128, codes).astype(np.uint8)


@cache
def float8_magnitudes(embed_dtype: Literal["fp8_e4m3", "fp8_e5m2"]) -> NDArray[np.float32]:
    """The finite values that are not negative, ascending: the value of each code (OCP 8-bit floating point 1.0)."""
    num_mantissa, bias, num_finite = (3, 7, 127) if embed_dtype == "fp8_e4m3" else (2, 15, 124)
    codes = np.arange(num_finite)
    exponent, mantissa = codes >> num_mantissa, codes & ((1 << num_mantissa) - 1)
    fraction = mantissa / (1 << num_mantissa)
    normal = np.ldexp(1 + fraction, exponent - bias)
    return np.where(exponent == 0, np.ldexp(fraction, 1 - bias), normal).astype(np.float32)
