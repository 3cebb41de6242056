"""What 8-bit weights cost and save: the command runs, its verdicts follow from the figures, and they are met."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="comes with the `bench` extra")

from benchmarks import sensitivities, weights
from tests.conftest import ROOT


@pytest.fixture
def record() -> dict[str, Any]:
    """Figures that meet every goal; they are not measured ones."""
    rows = {name: {"least_cosine": 1.0, "mean_cosine": 1.0, "weights_gb": 2.5} for name in weights.FORMATS}
    recall = {kind: {"recall_at_1": 0.9, "recall_at_5": 1.0, "mrr": 0.9} for kind in ("colors", "drawings")}
    return {
        "depth": {f"seed {seed}": copy.deepcopy(rows) for seed in weights.SEEDS},
        "speed": {
            name: {kind: 1.0 if "int8" in kind else 2.0 for kind in weights.SPEED_FORMATS} for name in weights.BATCHES
        },
        "recall": {name: copy.deepcopy(recall) for name in weights.RECALL_FORMATS},
    }


def test_committed_figures_are_of_the_2b_shape_and_meet_their_goals() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "weights.json").read_text())
    assert set(recorded) == {"environment", *weights.PARTS}
    assert "--shape 2b" in recorded["environment"]["command"]
    assert list(recorded["depth"]) == [f"seed {seed}" for seed in weights.SEEDS]
    assert [is_met for _, _, is_met in weights.verdicts(recorded)] == [True] * 4


def test_weights_were_chosen_with_another_seed_than_the_verdict() -> None:
    assert sensitivities.SEED not in weights.SEEDS


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("depth", "seed 1", "int8", "weights_gb"), 3.01),
        (("depth", "seed 2", "int8", "least_cosine"), 0.9989),
        (("speed", "text-64", "int8, bfloat16"), 1e9),
        (("recall", "int8, float32", "drawings", "recall_at_1"), 0.5),
    ],
    ids=lambda value: "",
)
def test_figure_that_misses_its_goal_fails(place: tuple[str, ...], value: float, record: dict[str, Any]) -> None:
    assert [is_met for _, _, is_met in weights.verdicts(record)] == [True] * 4
    figures = record
    for key in place[:-1]:
        figures = figures[key]
    figures[place[-1]] = value
    assert [is_met for _, _, is_met in weights.verdicts(record)].count(False) == 1


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--shape", "tiny", "--rounds", "1", "--count", "40", "--results", str(tmp_path)]
    weights.main(command)
    found = json.loads((tmp_path / "weights.json").read_text())
    assert capsys.readouterr().out.strip() == weights.describe(found)
    assert list(found["depth"]) == ["seed 1", "seed 2"]
    for rows in found["depth"].values():
        assert rows["bfloat16"]["least_cosine"] == pytest.approx(1, abs=1e-5)
        assert 0.998 <= rows["int8"]["least_cosine"] < 1  # of four layers, none keeps its weights
        assert 0.95 <= rows["fp8, emulated"]["least_cosine"] < rows["int8"]["least_cosine"]
    losses = found["sensitivities"]
    assert list(losses) == [
        "token embeddings",
        "layer 0",
        "layer 1",
        "layers 2 to 3",
        "vision blocks",
        "vision mergers",
    ]
    assert all(one["row"] > 0 and one["weights"] > 0 for one in losses.values())
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
