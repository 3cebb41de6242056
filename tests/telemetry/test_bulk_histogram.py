"""Many values counted at once are counted as one after the other."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from embedder.telemetry.bulk_histogram import BulkHistogram

BOUNDS = (0.1, 0.5, 2.0)


@pytest.mark.parametrize("values", [[], [0.1], [0.05, 0.1, 0.11, 0.5, 1.9, 2.0, 2.01, 1e9], [0.3] * 100])
def test_values_are_counted_as_by_observe(values: list[float]) -> None:
    texts = []
    for is_bulk in (True, False):
        registry = CollectorRegistry()
        histogram = BulkHistogram("seconds", "Seconds.", ["kind"], registry=registry, buckets=BOUNDS).labels("text")
        if is_bulk:
            histogram.observe_all(values)
        for value in () if is_bulk else values:
            histogram.observe(value)
        texts.append([line for line in generate_latest(registry).decode().splitlines() if "_created" not in line])
    assert texts[0] == texts[1]
    assert len(texts[0]) > 5
