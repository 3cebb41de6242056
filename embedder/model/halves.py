"""Computes the two halves of a batch at the same time on a CPU, each with half of the cores.

The threads that compute a batch together wait for each other after every operation. Halves wait once, at the end: on
two cores, a batch takes 4 to 8% less time (`python -m benchmarks.choices`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")

MIN_COST = 96.0  # of a half, in tokens; each half reads all weights, which takes longer than to compute a few rows
MAX_SHARE = 0.52  # of the larger half in the cost of both


def split(costs: Sequence[float]) -> tuple[list[int], list[int]] | None:
    """The indices of two halves of about equal cost. None if there are none, or if they would be too small."""
    halves: tuple[list[int], list[int]] = ([], [])
    sums = [0.0, 0.0]
    for index in sorted(range(len(costs)), key=lambda index: costs[index], reverse=True):
        smaller = int(sums[1] < sums[0])
        halves[smaller].append(index)
        sums[smaller] += costs[index]
    if min(sums) < MIN_COST or max(sums) > MAX_SHARE * sum(sums):
        return None
    return sorted(halves[0]), sorted(halves[1])


class TwoThreads:
    """Calls two functions at once: one in the caller's thread, the other in a thread that is kept."""

    def __init__(self) -> None:
        self._second = ThreadPoolExecutor(1, "second-half")

    @property
    def can_share(self) -> bool:
        """Whether torch's threads can be divided by two."""
        return torch.get_num_threads() % 2 == 0

    def __call__(self, first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
        """Both results, each computed with half of torch's threads.

        When both have ended, it raises the error of `first`, or else of `second`.
        """
        num_threads = torch.get_num_threads()
        torch.set_num_threads(num_threads // 2)  # also what a new thread begins with
        future = self._second.submit(_with_threads, num_threads // 2, second)
        try:
            return first(), future.result()
        finally:
            wait([future])
            torch.set_num_threads(num_threads)


def _with_threads(num_threads: int, function: Callable[[], Result]) -> Result:
    torch.set_num_threads(num_threads)
    return function()
