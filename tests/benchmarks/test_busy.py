"""Texts on cores that other processes use too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.busy import VARIABLES, busy_loops, run
from embedder.openmp import SPINS


@pytest.mark.parametrize(
    ("given", "expected"), [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_openmp_has_our_wait_policy_unless_the_environment_has_another(
    given: dict[str, str], expected: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | given
    code = "import os, embedder; print(os.environ.get('GOMP_SPINCOUNT'))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True
    ).stdout
    assert printed == f"{expected}\n"


@pytest.mark.slow
def test_busy_neighbors_slow_queries_less_than_with_spinning_threads() -> None:
    """How much less depends on the machine and its other processes."""
    with busy_loops(os.cpu_count() or 1, max_s=240):
        ratios = [ratio("p90 ms", "spinning") for _ in range(3)]
    assert sorted(ratios)[1] > 1.5, ratios


@pytest.mark.slow
def test_queries_on_idle_cores_are_faster_than_with_threads_that_sleep() -> None:
    ratios = [ratio("p50 ms", "0") for _ in range(3)]
    assert max(ratios) > 1.2, ratios


def ratio(figure: str, policy: str) -> float:
    """How many times as long a query takes with this policy as with ours."""
    theirs, ours = run(policy, 3), run("embedder's own", 3)
    return float(str(theirs[figure])) / float(str(ours[figure]))
