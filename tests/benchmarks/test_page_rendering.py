"""The share of rendering: the command runs, and its record follows from what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="comes with the `bench` extra")
pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

from benchmarks import page_rendering
from embedder.engine.observer import Batch
from tests.conftest import ROOT


@pytest.mark.slow
def test_share_follows_from_what_was_measured(tmp_path: Path) -> None:
    result = page_rendering.main(["--shape", "tiny", "--documents", "1", "--results", str(tmp_path)])
    assert result["pages"] == 10
    assert result["page_pixels"] == [1120, 1120]
    whole = result["render_cpu_s"] + 10 * result["model_cpu_s_per_page"]
    assert result["share"] == pytest.approx(result["render_cpu_s"] / whole)
    assert 0 < result["share"] < 1
    assert 0 <= result["idle_share"] < 1
    assert str(tmp_path) not in (tmp_path / "page_rendering.json").read_text()


def test_idle_share_is_the_time_without_a_batch() -> None:
    observer = page_rendering.Batches()
    for start, end in ((1.0, 2.0), (2.0, 4.0), (5.0, 6.0)):
        observer.ran(Batch(1, 1, start, end), [])
    assert observer.idle_share() == pytest.approx(0.2)


def test_record_is_of_200_pages_of_the_2b_shape() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "page_rendering.json").read_text())
    assert "--shape 2b" in record["environment"]["command"]
    assert record["pages"] == 200
    assert record["share"] < 0.15  # what docs/guides/documents.md promises
