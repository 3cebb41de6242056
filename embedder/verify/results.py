"""The result of one check, and the table that the command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedder.verify.probes import Vector

# Minimum cosines. In float32 only rounding differs; the other two are the accepted tolerances for bfloat16.
MIN_FLOAT32_COSINE, MIN_TEXT_COSINE, MIN_IMAGE_COSINE = 0.99999, 0.9997, 0.997
MIN_EIGHT_BIT_COSINE = {"int8": 0.998, "fp8": 0.98}  # to the same weights in 16 or 32 bits


@dataclass(frozen=True)
class Check:
    """One row of the table.

    `verdict`: `ok`, `FAILED`, `differs` (from a published value), `not run: ` with what the user has to give for a
    comparison with published values, or `not checked: ` with the reason why the check does not apply.
    """

    name: str
    value: str
    expected: str
    verdict: str


def check(name: str, is_met: bool, value: str, expected: str) -> Check:
    return Check(name, value, expected, "ok" if is_met else "FAILED")


def cosine_check(name: str, value: float, minimum: float) -> Check:
    return check(name, value >= minimum, f"{value:.7f}", f">= {minimum}")


def compared(name: str, pairs: Sequence[tuple[float, float]], max_error: float, origin: str) -> Check:
    """Values and what was published for them: equal if no difference is above `max_error`."""
    value, published = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    is_equal = abs(value - published) <= max_error  # false for NaN
    shown = f"{value:.5f} for {published:.5f}" + (f", worst of {len(pairs)}" if len(pairs) > 1 else "")
    return Check(name, shown, f"± {max_error}, {origin}", "ok" if is_equal else "differs")


def not_run(name: str, reason: str) -> Check:
    return Check(name, "", "", f"not run: {reason}")


def not_checked(name: str, reason: str) -> Check:
    return Check(name, "", "", f"not checked: {reason}")


def min_cosine_for(bfloat16_minimum: float, info: Mapping[str, Any]) -> float:
    """The minimum cosine for the dtype in `info`."""
    return MIN_FLOAT32_COSINE if info.get("dtype") == "float32" else bfloat16_minimum


def min_cosine_to_others(bfloat16_minimum: float, info: Mapping[str, Any]) -> float:
    """The minimum cosine to vectors of another program, which has the weights in 16 or 32 bits."""
    return min(min_cosine_for(bfloat16_minimum, info), MIN_EIGHT_BIT_COSINE.get(str(info.get("weights")), 1.0))


def cosine(left: Vector, right: Vector) -> float:
    """The cosine, or 0 if the lengths differ or a vector is zero."""
    if len(left) != len(right):
        return 0.0
    a, b = left.astype(np.float64), right.astype(np.float64)
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)


def lowest_cosine(left: Sequence[Vector], right: Sequence[Vector]) -> float:
    return min(cosine(a, b) for a, b in zip(left, right, strict=True))


def shorten(message: object) -> str:
    """The first 160 characters on one line."""
    text = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
    return " ".join(text.split())[:160]


def format_table(checks: Sequence[Check]) -> str:
    """Aligned columns, and a last line with the counts."""
    rows = [("check", "value", "expected", "verdict")]
    rows += [(row.name, row.value, row.expected, row.verdict) for row in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    ]
    kinds = ("ok", "failed", "differs", "not run", "not checked")
    counts = [sum(row.verdict.lower().startswith(kind) for row in checks) for kind in kinds]
    return "\n".join([*lines, ", ".join(f"{count} {kind}" for count, kind in zip(counts, kinds, strict=True))])
