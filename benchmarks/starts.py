"""Where the time of a start goes: `python -m benchmarks.starts [--model FOLDER]`.

Starts the service a few times and prints the median time of each part, until a probe finds it ready; then the time of
`import embedder`, and of `--help` of each command. Other processes make the wall-clock time longer, and the CPU time
less so. For a model with the shapes of the 2B, `python -m benchmarks.random_checkpoint 2b FOLDER` writes one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks import report
from benchmarks.contenders import ROOT, free_port

FILE = "starts"
TIMES = "BENCHMARK_START_TIMES"  # variable with the path of the file that `timed_service` writes
POLL_S, MAX_S = 0.02, 600.0
COMMANDS = ("embedder.bulk", "embedder.doctor", "embedder.search", "embedder.verify")
READY, PROBE = "until ready", "until a probe is answered"
Times = dict[str, tuple[float, float]]  # by part: seconds, and CPU seconds of the process that it runs in


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="as EMBEDDER_MODEL; default: %(default)s")
    parser.add_argument("--name", default="bundled", help="of the model in the record; default: %(default)s")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command(FILE, argparse.Namespace(**{**vars(chosen), "model": None})))
    starts = [start_times(chosen.model) for _ in tqdm(range(chosen.starts), desc="starts", file=sys.stderr)]
    commands = {name: seconds_of(code) for name, code in _commands().items()}
    parts = {part: _medians([one[part] for one in starts]) for part in starts[0]}
    data = {"environment": about, "parts": parts, "all_s": [one[READY][0] for one in starts], "commands": commands}
    report.save(chosen.results, f"{FILE}-{chosen.name}", data, table(parts, commands), {}, "s")
    print(table(parts, commands))
    return data


def _medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    wall_s, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
    return wall_s, cpu_s


def start_times(model: str) -> Times:
    """Seconds of each part of one start, in order, and of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        marks, log = Path(folder) / "times", Path(folder) / "log"
        command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.timed_service:Qwen3VLEmbedding"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        settings = {
            "EMBEDDER_MODEL": model,
            "EMBEDDER_DEVICE": "cpu",
            TIMES: str(marks),
            "BENTOML_DO_NOT_TRACK": "True",
        }
        with log.open("wb") as output:
            begin_s = time.time()
            process = subprocess.Popen(  # noqa: S603 - a fixed command
                command, cwd=ROOT, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            ready_s = _ready_s(port, process, log)
        finally:
            process.terminate()
            process.wait(60)
        marks_read = [json.loads(line) for line in marks.read_text(encoding="utf-8").splitlines()]
    times: Times = {}
    last_s, spent_s = begin_s, dict[int, float]()
    for mark in marks_read:
        cpu_s = mark["cpu_s"] - spent_s.get(mark["pid"], 0.0)
        times[mark["part"]] = mark["s"] - last_s, cpu_s
        last_s, spent_s[mark["pid"]] = mark["s"], mark["cpu_s"]
    times[PROBE] = ready_s - last_s, 0.0
    return {**times, READY: (ready_s - begin_s, sum(cpu_s for _, cpu_s in times.values()))}


def _ready_s(port: int, process: subprocess.Popen[bytes], log: Path) -> float:
    deadline = time.monotonic() + MAX_S
    with httpx.Client(timeout=2) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    return time.time()
            time.sleep(POLL_S)
    raise RuntimeError(f"the service did not become ready:\n{log.read_text(errors='replace')[-3000:]}")


def _commands() -> dict[str, list[str]]:
    return {
        "import embedder": ["-c", "import embedder"],
        **{f"{one} --help": ["-m", one, "--help"] for one in COMMANDS},
    }


def seconds_of(arguments: Sequence[str]) -> float:
    """The median time of three runs of Python with these arguments."""
    times = []
    for _ in range(3):
        begin_s = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times)


def table(parts: Mapping[str, Sequence[float]], commands: Mapping[str, float]) -> str:
    """Markdown."""
    rows = [(part, f"{wall_s:.2f}", f"{cpu_s:.2f}") for part, (wall_s, cpu_s) in parts.items()]
    rows += [(command, f"{seconds:.2f}", "") for command, seconds in commands.items()]
    return report.table(("part", "s", "CPU s"), rows)


if __name__ == "__main__":
    main()
