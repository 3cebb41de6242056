"""A run of `embedder.bulk` that is killed in the middle."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT


def run_and_kill(command: Sequence[str], environment: Mapping[str, str], output: Path, num_files: int) -> None:
    """Run the command, and kill it once `output` has so many Parquet files. Fails if it ends before."""
    log = output.with_suffix(".log")
    with log.open("wb") as lines:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=lines, stderr=subprocess.STDOUT)
        while process.poll() is None and len(list(output.glob("*.parquet"))) < num_files:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
