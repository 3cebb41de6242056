"""A clear slowdown is found, and noise is not taken for one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.guard import change_of, compare, find_commit
from tests.conftest import ROOT


def rounds(factor: float, noise: float) -> list[tuple[float, float]]:
    rng = np.random.default_rng(1)
    base = 0.01 * np.exp(noise * rng.standard_normal(15))
    new = 0.01 * factor * np.exp(noise * rng.standard_normal(15))
    return list(zip(base.tolist(), new.tolist(), strict=True))


@pytest.mark.parametrize(
    ("factor", "noise", "expected"),
    [(1.3, 0.02, True), (1.3, 0.1, True), (1.1, 0.02, False), (1.0, 0.3, False), (0.5, 0.02, False)],
)
def test_only_a_clear_slowdown_is_a_regression(factor: float, noise: float, expected: bool) -> None:
    assert change_of(rounds(factor, noise)).is_regression is expected


def test_change_is_the_median_of_the_rounds_with_an_interval_around_it() -> None:
    change = change_of([(1.0, 1.1), (2.0, 2.2), (1.0, 5.0), (3.0, 3.3), (1.0, 1.1)])
    assert change.median == pytest.approx(0.1)
    assert change.low == pytest.approx(0.1)
    assert change.high > 1


def test_a_whole_machine_that_gets_slower_changes_nothing() -> None:
    assert change_of([(time, time) for time in (1.0, 2.0, 4.0)]).median == 0


def test_commit_that_is_not_there_is_none() -> None:
    assert find_commit("no-such-commit") is None


@pytest.mark.slow
def test_tree_that_waits_in_each_batch_is_found_slower(tmp_path: Path) -> None:
    for name in ("base", "new"):
        (tmp_path / name).mkdir()
        for part in ("embedder", "deploy"):
            shutil.copytree(ROOT / part, tmp_path / name / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "service.py", tmp_path / name)
    pooling, first = tmp_path / "new" / "embedder" / "model" / "pooling.py", "    rows = hidden_states"
    code = pooling.read_text(encoding="utf-8")
    assert first in code
    pooling.write_text(code.replace(first, f"    import time; time.sleep(0.05)\n{first}"), encoding="utf-8")
    changes = compare(tmp_path / "base", tmp_path / "new", rounds=3)
    assert changes["one query"].is_regression
    assert changes["one query"].median > 1
