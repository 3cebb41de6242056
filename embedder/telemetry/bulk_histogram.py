"""prometheus_client's histogram, with one write for all values of a batch that are in the same bucket."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from prometheus_client import Histogram


class BulkHistogram(Histogram):
    """A histogram that takes a batch of values at once: 64 take 12 µs, and 104 one after the other.

    This is CPU time of one core of an AMD EPYC (`python -m benchmarks.micro`). The class uses what `Histogram.observe`
    does: `_sum`, `_upper_bounds` and `_buckets` (prometheus_client 0.26).
    """

    def observe_all(self, values: Sequence[float]) -> None:
        """The same as `observe` with each value."""
        if not values:
            return
        self._sum.inc(sum(values))
        for place, count in Counter([bisect_left(self._upper_bounds, value) for value in values]).items():
            self._buckets[place].inc(count)
