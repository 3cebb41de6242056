"""A Ray whose processes do not answer in time, as on a busy machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="comes with the `bulk` extra")

import ray

from embedder.bulk import actors
from embedder.bulk.__main__ import main
from embedder.bulk.command import ALL_EMBEDDED, PARTS_MISSING


class Late:
    """`ray.init`, of which the first starts fail as Ray fails when a node does not answer within 30 seconds."""

    def __init__(self, num_failures: int) -> None:
        self.init = ray.init
        self.num_failures = num_failures
        self.num_starts = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.num_starts += 1
        if self.num_starts <= self.num_failures:
            raise Exception("The current node timed out during startup.")
        return self.init(*arguments, **options)


def run(monkeypatch: pytest.MonkeyPatch, late: Late, folder: Path, model: Path) -> int:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"text": "red"}) + "\n")
    monkeypatch.setattr(actors.ray, "init", late)
    monkeypatch.setenv("EMBEDDER_MODEL", str(model))
    monkeypatch.setenv("EMBEDDER_DEVICE", "cpu")
    return main([str(rows), str(folder / "out")])


def test_command_says_that_ray_did_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, random_checkpoint: Path
) -> None:
    late = Late(num_failures=actors.LOCAL_STARTS)
    assert run(monkeypatch, late, tmp_path, random_checkpoint) == PARTS_MISSING
    assert late.num_starts == actors.LOCAL_STARTS
    printed = capsys.readouterr().err
    assert "stopped: Ray did not start: The current node timed out during startup." in printed
    assert "run the same command again to resume" in printed


@pytest.mark.slow  # Ray starts
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by Ray itself
def test_ray_is_started_again_if_it_was_late(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, random_checkpoint: Path
) -> None:
    late = Late(num_failures=1)
    assert run(monkeypatch, late, tmp_path, random_checkpoint) == ALL_EMBEDDED
    assert late.num_starts == 2
