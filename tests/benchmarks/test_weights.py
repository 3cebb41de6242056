"""What 8-bit weights cost and save: the command runs, its verdicts follow from the figures, and they are met."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="comes with the `bench` extra")

from benchmarks import weights
from tests.conftest import ROOT


@pytest.fixture
def record() -> dict[str, Any]:
    """As it is committed."""
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "weights.json").read_text())
    return content


def test_record_is_of_the_2b_shape_and_meets_every_goal(record: dict[str, Any]) -> None:
    assert set(weights.PARTS) <= set(record)
    assert "--shape 2b" in record["environment"]["command"]
    assert len(weights.verdicts(record)) == 4
    assert all(is_met for _, _, is_met in weights.verdicts(record))
    assert record["service"]["weights"] == "int8"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("depth", "int8", "weights_gb"), 3.3),
        (("depth", "int8", "least_cosine"), 0.9989),
        (("speed", "text-64", "int8, bfloat16"), 1e9),
        (("recall", "int8, float32", "drawings", "recall_at_1"), 0.5),
    ],
    ids=lambda value: "",
)
def test_figure_that_misses_its_goal_fails(place: tuple[str, ...], value: float, record: dict[str, Any]) -> None:
    changed = copy.deepcopy(record)
    figures = changed
    for key in place[:-1]:
        figures = figures[key]
    figures[place[-1]] = value
    assert [is_met for _, _, is_met in weights.verdicts(changed)].count(False) == 1


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--shape", "tiny", "--rounds", "1", "--count", "40", "--results", str(tmp_path)]
    weights.main(command)
    found = json.loads((tmp_path / "weights.json").read_text())
    assert capsys.readouterr().out.strip() == weights.describe(found)
    assert found["depth"]["bfloat16"]["least_cosine"] == pytest.approx(1, abs=1e-5)
    assert weights.MIN_COSINE <= found["depth"]["int8"]["least_cosine"] < 1
    assert 0.95 <= found["depth"]["fp8, emulated"]["least_cosine"] < found["depth"]["int8"]["least_cosine"]
    assert found["service"]["weights"] == "int8"
    assert str(tmp_path) not in (tmp_path / "weights.json").read_text()


@pytest.mark.slow
def test_peak_while_loading_stays_near_the_8_bits(tmp_path: Path) -> None:
    """0.28 GB in bfloat16, of which int8 needs 0.22: the layers are a smaller part than of the 2B."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from benchmarks.checkpoints import tokenizer
    from benchmarks.random_checkpoint import shape_config, write_checkpoint

    write_checkpoint(tmp_path, shape_config("small", tokenizer()), tokenizer(), dtype="bfloat16")
    rows = {}
    for name in ("bfloat16", "int8"):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            vectors, rows[name] = process.submit(weights.embed_all, tmp_path, weights.FORMATS[name]).result()
        assert np.isfinite(vectors).all()
    assert rows["int8"]["weights_gb"] < 0.9 * rows["bfloat16"]["weights_gb"]
    assert rows["int8"]["peak_loading_gb"] < rows["bfloat16"]["peak_loading_gb"]
