"""Which of two ways to compute something is faster on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

MIN_ROUNDS = 3  # the first one includes the generation of code
MAX_TIME_RATIO = 0.95  # a smaller difference is noise


def time_ratio(ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> float:
    """The shortest time of `ours` divided by that of `theirs`, measured in alternation: other processes slow both."""
    times: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + seconds
    while len(times[0]) < MIN_ROUNDS or time.perf_counter() < stop:
        for compute, durations in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            compute()
            durations.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])
