"""CPU time and memory of a process and its children."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import psutil

PERIOD_S = 0.1


class Meter:
    """Measure during a `with` block. Memory is the sampled sum of resident sizes; shared pages count several times."""

    def __init__(self, pid: int | None = None) -> None:
        self.pid = os.getpid() if pid is None else pid
        self.cpu_s = 0.0
        self.samples: list[int] = []  # memory in bytes, in the order of time
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self.cpu_s = -cpu_seconds(self.pid)
        self.samples.append(resident_bytes(self.pid))
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        self.cpu_s += cpu_seconds(self.pid)

    def _sample(self) -> None:
        while not self._stopped.wait(PERIOD_S):
            self.samples.append(resident_bytes(self.pid))

    @property
    def peak_bytes(self) -> int:
        """The largest sample."""
        return max(self.samples)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, so far."""
    times = [process.cpu_times() for process in _tree(pid)]
    return float(sum(one.user + one.system for one in times))


def resident_bytes(pid: int) -> int:
    """Current resident bytes of a process and its children; shared pages count several times."""
    return sum(map(_resident, _tree(pid)))


def footprint(pid: int) -> tuple[int, int]:
    """Current resident bytes and open files of a process and its children."""
    return resident_bytes(pid), sum(process.num_fds() for process in _tree(pid))


def medians(samples: Sequence[float], parts: int) -> list[float]:
    """Medians of `parts` consecutive parts of the samples. A median ignores the memory of single batches."""
    return [float(np.median(part)) for part in np.array_split(samples, min(parts, len(samples)))]


def _tree(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _resident(process: psutil.Process) -> int:
    try:
        size: int = process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return size
