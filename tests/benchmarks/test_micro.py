"""The steps of `benchmarks.micro` do the same in both ways, and the comments' claims hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import micro


def test_both_ways_give_the_same_result() -> None:
    with micro.steps() as steps:
        wrong = [name for name, step in steps.items() if not step.is_same(step.ours(), step.usual())]
    assert not wrong


@pytest.mark.slow
def test_each_step_is_faster_than_the_usual_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU time, in which the claims are 2 to 30 times as fast."""
    data = micro.main(["--rounds", "5", "--results", str(tmp_path)])
    slower = [name for name, one in data["steps"].items() if one["ours_us"] >= one["usual_us"]]
    assert not slower
    assert max(data["bounded_us"].values()) < 100_000  # the event loop may wait so long
    assert micro.table(data["steps"]) in capsys.readouterr().out
    assert (tmp_path / "micro.json").is_file()
