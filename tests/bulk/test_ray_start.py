"""A Ray whose processes do not answer in time, as on a busy machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("ray", reason="comes with the `bulk` extra")

from embedder.bulk import actors

pytestmark = pytest.mark.slow

# The command, where the first starts of Ray fail as Ray fails if a node does not answer within 30 seconds.
PROGRAM = """
import sys
import ray
from embedder.bulk.__main__ import main

start, num_starts = ray.init, 0

def start_late(*arguments, **options):
    global num_starts
    num_starts += 1
    if num_starts <= {num_failures}:
        raise Exception("The current node timed out during startup.")
    return start(*arguments, **options)

ray.init = start_late
status = main(sys.argv[1:])
print(num_starts, "starts")
sys.exit(status)
"""


def run(folder: Path, model: Path, num_failures: int) -> subprocess.CompletedProcess[str]:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"text": "red"}) + "\n")
    command = [sys.executable, "-c", PROGRAM.format(num_failures=num_failures), str(rows), str(folder / "out")]
    environment = {**os.environ, "EMBEDDER_MODEL": str(model), "EMBEDDER_DEVICE": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_command_says_that_ray_did_not_start(tmp_path: Path, random_checkpoint: Path) -> None:
    done = run(tmp_path, random_checkpoint, num_failures=actors.LOCAL_STARTS)
    assert done.returncode == 1
    assert f"{actors.LOCAL_STARTS} starts" in done.stdout
    assert "stopped: Ray did not start: The current node timed out during startup." in done.stderr
    assert "run the same command again to resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_ray_is_started_again_if_it_was_late(tmp_path: Path, random_checkpoint: Path) -> None:
    done = run(tmp_path, random_checkpoint, num_failures=1)
    assert done.returncode == 0, done.stderr
    assert "2 starts" in done.stdout
