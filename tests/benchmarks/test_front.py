"""The benchmarks of what is around the model: its CPU time, one worker at a simulated GPU, and the parts of a start."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import front, pretended_gpu, starts

pytestmark = pytest.mark.slow


def test_cpu_time_of_an_item_is_measured_for_each_workload_and_compared_with_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = front.main(["--base", "HEAD", "--rounds", "1", "--results", str(tmp_path)])
    times = {row["workload"]: row["now"] for row in data["rows"]}
    assert set(times) == {*(workload.name for workload in front.WORKLOADS), front.GZIP}
    assert times[front.MANY] < times[front.SINGLE] < 10
    assert all(0.2 < row["now"] / row["base"] < 5 for row in data["rows"])
    assert front.table(data["rows"]) in capsys.readouterr().out
    assert (tmp_path / "front.json").is_file()


def test_unknown_base_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        front.main(["--base", "no-such-commit"])
    assert "no-such-commit" in capsys.readouterr().err


def test_pretended_gpu_is_busy_at_most_all_of_the_time(tmp_path: Path) -> None:
    rows = pretended_gpu.main(["--seconds", "2", "--results", str(tmp_path)])["rows"]
    assert len(rows) == len(pretended_gpu.LAYOUTS) * len(pretended_gpu.LOADS)
    assert all(0 < row["busy"] < 1.2 and row["items_per_s"] > 0 for row in rows)  # a batch may end after the load
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)


def test_parts_of_a_start_add_up_to_the_whole(tmp_path: Path) -> None:
    data = starts.main(["--starts", "1", "--results", str(tmp_path)])
    parts = dict(data["parts"])
    whole = parts.pop(starts.READY)
    assert len(parts) == 12
    assert [sum(column) for column in zip(*parts.values(), strict=True)] == pytest.approx(whole)
    assert all(seconds >= 0 for part in parts.values() for seconds in part)
    assert whole[1] < 15  # CPU seconds; 5 when this was written
    assert all(seconds < 5 for seconds in data["commands"].values())
