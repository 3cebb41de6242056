"""The requests in progress in this worker, and whether it still accepts new ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Drain:
    """Counts requests in progress. `is_draining` is set when the worker is to stop."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_requests = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request while the block runs."""
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
