"""Computes the two halves of a batch at the same time on a CPU, each with half of the cores.

The threads that compute a batch together wait for each other after every operation. Halves wait once, at the end: on
two cores, batches take 4 to 8% less time in float32 (`python -m benchmarks.choices`), and gain more in bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

Result = TypeVar("Result")

MIN_COST = 128.0  # of a half, in tokens; each half reads all weights, which takes longer than to compute a few rows
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


def can_share_threads() -> bool:
    """Whether torch's threads can be divided by two."""
    return torch.get_num_threads() % 2 == 0


def compute_both(first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
    """Both results, each computed with half of torch's threads: `first` in the calling thread, `second` in another one.

    When both have ended, it raises the error of `first`, or else of `second`.
    """
    num_threads = torch.get_num_threads()
    outcome: Future[Result] = Future()
    thread = threading.Thread(target=_complete, args=(outcome, num_threads // 2, second), name="second-half")
    thread.daemon = True  # the end of a program does not wait for it
    thread.start()
    torch.set_num_threads(num_threads // 2)
    try:
        return first(), outcome.result()
    finally:
        thread.join()
        torch.set_num_threads(num_threads)


def _complete(outcome: Future[Result], num_threads: int, function: Callable[[], Result]) -> None:
    torch.set_num_threads(num_threads)
    try:
        outcome.set_result(function())
    except BaseException as error:
        outcome.set_exception(error)
    finally:
        del outcome  # the error has this frame, and would refer to itself and keep the batch's memory
