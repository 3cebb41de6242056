"""OpenMP's threads, which compute torch's operations on a CPU: how many there are and how they wait for each other.

This is about libgomp, GCC's OpenMP, which torch's builds for Linux contain.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

SPINS = 20_000  # about 0.2 ms, longer than torch needs between two operations of a layer; more would delay responses


def set_wait_policy() -> None:
    """Let waiting threads spin `SPINS` times, and then sleep, unless the user has chosen a policy.

    libgomp reads this when torch loads it. While a program has more OpenMP threads than it has cores, its threads spin
    100 times only: `embedder.model.spinning` makes use of that.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def has_our_wait_policy() -> bool:
    """Whether `set_wait_policy` has chosen it, and not the user."""
    return os.environ.get("GOMP_SPINCOUNT") == str(SPINS) and "OMP_WAIT_POLICY" not in os.environ


def num_cores() -> int:
    """The cores that OpenMP counts: it does not know the CPU limit of a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(count: int) -> None:
    """Set how many threads the calling thread computes with, like `torch.set_num_threads`, but for no other thread.

    Needs torch loaded, and `torch.get_num_threads()` called before: that ends torch's own setup of a thread, which
    would undo this. No effect if torch is built without OpenMP, or with one that is not visible.
    """
    function = _omp_set_num_threads()
    if function:
        function(count)


@cache
def _omp_set_num_threads() -> Callable[[int], None] | None:
    return getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
