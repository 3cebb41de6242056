"""Lets OpenMP's threads spin while they wait for each other, as long as no other program needs the cores.

The threads that compute an operation wait for each other after it, and for the next operation. A thread that spins goes
on at once; one that sleeps has to be woken up, and a query of the bundled model then takes 4.6 ms instead of 3.4. But
next to busy processes, waiting threads that spin occupy cores that the working ones need, and one query in ten takes
100 ms instead of 13 (2 cores, `python -m benchmarks.busy`).

`Spinning` therefore measures how long the threads of this process wait for a core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from embedder import openmp

CHECK_S = 0.1  # of computing, after which the waiting times are read: 0.2 ms for the threads of the service
# The share of waiting: seconds for which all threads together wait, per second of computing. Next to a busy process it
# is 0.7 to 1 if threads spin, and 0.3 to 0.7 if not. Alone it is mostly below 0.03; but up to 0.25 with a small model,
# where the threads that spin make the callers wait.
MAX_SHARE = 0.4  # of the last reading; above it, threads stop spinning
MAX_MEAN_SHARE = 0.15  # of a moving average; below it, they begin to spin
WEIGHT = 0.2  # of the last reading in the average, which thus falls from 1 to MAX_MEAN_SHARE in 9 readings

TASKS = Path("/proc/self/task")


class Spinning:
    """Decides whether OpenMP's threads spin. At first they do not.

    Its methods are for the thread that computes. `waits` gives the seconds for which each thread of the process has
    waited for a core so far, by the thread's id; `clock` gives seconds.
    """

    def __init__(
        self,
        waits: Callable[[], Mapping[str, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_waits = waits or read_waits
        self._clock = clock
        self._num_threads = torch.get_num_threads()
        self._waits: Mapping[str, float] = {}
        self._computed_s = 0.0  # since the waiting times were read
        self._mean_share = 1.0
        self._since_s = 0.0
        self._surplus: Surplus | None = Surplus()

    @property
    def is_allowed(self) -> bool:
        """Whether waiting threads spin."""
        return self._surplus is None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around everything that the threads compute."""
        self._since_s = self._clock()
        try:
            yield
        finally:
            self.check()

    def check(self) -> None:
        """Decide again, if enough time was spent computing. Call it between the layers of a batch, too."""
        if torch.get_num_threads() != self._num_threads:  # one half of a batch (`halves`)
            return
        now_s = self._clock()
        self._computed_s += now_s - self._since_s
        self._since_s = now_s
        if self._computed_s < CHECK_S:
            return
        share = self._read_share()
        self._mean_share += WEIGHT * (share - self._mean_share)
        if self._surplus and self._mean_share < MAX_MEAN_SHARE:
            self.close()
        elif not self._surplus and share > MAX_SHARE:
            self._mean_share = 1.0
            self._surplus = Surplus()

    def _read_share(self) -> float:
        """The share of waiting since the last call; 1 if it is not known."""
        waits = self._read_waits()
        waited_s = sum(max(0.0, waited_s - self._waits.get(name, 0.0)) for name, waited_s in waits.items())
        share = min(1.0, waited_s / self._computed_s) if waits else 1.0
        self._waits, self._computed_s = waits, 0.0
        return share

    def close(self) -> None:
        """End the thread that keeps others from spinning."""
        if self._surplus:
            self._surplus.end()
            self._surplus = None


class Surplus:
    """OpenMP threads that compute nothing. With them there are more than cores, so that libgomp's threads sleep."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        is_ready = threading.Event()
        thread = threading.Thread(target=self._keep_threads, args=(is_ready,), name="openmp-surplus", daemon=True)
        thread.start()
        is_ready.wait()

    def end(self) -> None:
        """End the threads."""
        self._is_over.set()

    def _keep_threads(self, is_ready: threading.Event) -> None:
        torch.get_num_threads()  # as `set_num_threads` asks for
        openmp.set_num_threads(openmp.num_cores())
        torch.zeros(2**16).add_(1)  # large enough for torch to compute it in parallel
        is_ready.set()
        self._is_over.wait()


def read_waits() -> dict[str, float]:
    """The seconds for which each thread of this process was ready to run, but had no core. Empty if not known."""
    waits = {}
    for task in TASKS.glob("*/schedstat"):
        try:
            ran_ns, waited_ns = map(int, task.read_bytes().split()[:2])
        except OSError:  # the thread has ended
            continue
        if ran_ns:  # some kernels give zeros only
            waits[task.parent.name] = waited_ns / 1e9
    return waits
