"""Texts on cores that other processes use too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.busy import VARIABLES, busy_loops, run


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_of_openmp_wait_without_spinning_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | given
    code = "import os, embedder; print(os.environ.get('GOMP_SPINCOUNT'))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True
    ).stdout
    assert printed == f"{expected}\n"


@pytest.mark.slow
def test_texts_are_embedded_next_to_busy_processes() -> None:
    """How many with and without spinning threads is measured by `python -m benchmarks.busy`."""
    with busy_loops(os.cpu_count() or 1, max_s=120):
        for name in ("embedder's own", "spinning"):
            assert float(str(run(name, 3)["texts/s"])) > 0
