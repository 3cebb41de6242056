"""Log-odds to scores, and scores to an order."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sigmoid(logit: float) -> float:
    """Convert log-odds to a probability."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def best_first(scores: Sequence[float]) -> list[int]:
    """The indices of the scores, the highest score first; equal scores stay in order."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])
