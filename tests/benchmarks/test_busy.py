"""Text queries on cores that other processes use too."""

from __future__ import annotations

import os

import pytest

from benchmarks.busy import busy_loops, run


@pytest.mark.slow
def test_busy_neighbors_slow_a_query_less_than_with_spinning_threads() -> None:
    with busy_loops(os.cpu_count() or 1, max_s=120):
        own, spinning = run("embedder's own", 3), run("spinning", 3)
    assert float(str(own["p50 ms"])) * 2 < float(str(spinning["p50 ms"]))
    assert float(str(own["texts/s"])) > 2 * float(str(spinning["texts/s"]))
