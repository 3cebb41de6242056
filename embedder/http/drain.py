"""The requests in progress in this worker, and whether it still accepts new ones."""

from __future__ import annotations


class Drain:
    """Counts requests in progress: each runs in a block `with drain`. `is_draining` is set when the worker is to stop.

    A class, because entering a generator for each request takes three times as long (0.7 µs on one core of an AMD
    EPYC, `python -m benchmarks.micro`).
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.num_requests = 0

    def __enter__(self) -> None:
        self.num_requests += 1

    def __exit__(self, *_: object) -> None:
        self.num_requests -= 1
