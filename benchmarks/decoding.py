"""Measure what decoding in separate processes costs: `python -m benchmarks.decoding`.

Three engines preprocess the same good clips and pictures in turns, with a model that computes nothing: one decodes in
processes what the service decodes there, one decodes everything in its threads, and one is that of an earlier commit,
by default the last one that had no processes.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
from tqdm import tqdm

from benchmarks import decoding_program, report
from benchmarks.checkpoints import random_folder
from benchmarks.contenders import ROOT
from benchmarks.guard import find_commit, worktree
from benchmarks.workloads import make_items

BEFORE_PROCESSES = "4cf60d1~1"
PICTURES_PER_CLIP = 8
PROCESSES, THREADS, BASE = "in processes", "in threads", "before"
RATIOS = {"processes / threads": THREADS, "processes / before": BASE}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Clips and pictures per second, decoded in processes and in threads.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--num-items", type=int, default=24, help="clips of each kind in a round; of pictures there are more"
    )
    parser.add_argument("--base", default=BEFORE_PROCESSES, help="an earlier commit")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command("decoding", chosen))
    items = {kind: make() for kind, make in KINDS.items()}
    rates = {}
    with _contenders(items, find_commit(chosen.base)) as contenders:
        for kind in tqdm(items, desc="kinds", unit="kind"):
            num_items = chosen.num_items * (1 if kind.startswith("clips") else PICTURES_PER_CLIP)
            rates[kind] = _rates(contenders, kind, num_items, chosen.rounds)
    names = (PROCESSES, THREADS, BASE)
    rows = [
        [
            kind,
            *(report.number(one[name]) if name in one else "-" for name in names),
            *(f"{one[ratio]:.2f}" if ratio in one else "-" for ratio in RATIOS),
        ]
        for kind, one in rates.items()
    ]
    text = report.table(("items/s", *names, *RATIOS), rows)
    text += "\n\nRatios are medians of the rounds. A dash: the earlier commit cannot read the format, or is not here.\n"
    data = {"environment": about, "base": chosen.base, "items_per_s": rates}
    bars = {kind: {name: one[name] for name in names if name in one} for kind, one in rates.items()}
    report.save(chosen.results, "decoding", data, text, bars, "items per second")
    print(text)
    return data


@dataclass(frozen=True)
class _Contender:
    """A process with an engine."""

    name: str
    process: subprocess.Popen[str]

    def seconds(self, kind: str, num_items: int) -> float | None:
        """How long some items take; None if the engine cannot read them."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([kind, num_items]), file=self.process.stdin, flush=True)
        answer: float | None = json.loads(self.process.stdout.readline())
        return answer


@contextlib.contextmanager
def _contenders(items: dict[str, list[tuple[str, bytes]]], base: str | None) -> Iterator[list[_Contender]]:
    encoded = {kind: [(name, base64.b64encode(data).decode()) for name, data in some] for kind, some in items.items()}
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(random_folder("tiny"))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "items.json"
        file.write_text(json.dumps(encoded), encoding="ascii")
        starts = [(PROCESSES, ROOT, ()), (THREADS, ROOT, ("--threads",))]
        if base is not None:
            starts.append((BASE, stack.enter_context(worktree(base)), ()))
        contenders = []
        for name, tree, options in starts:
            command = [sys.executable, "-P", decoding_program.__file__, str(file), str(checkpoint), *options]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen(command, env=environment, cwd=tree, text=True, **pipes)  # noqa: S603
            stack.enter_context(process)
            contenders.append(_Contender(name, process))
        yield contenders


def _rates(contenders: list[_Contender], kind: str, num_items: int, rounds: int) -> dict[str, float]:
    """Items per second of each contender, and the medians of the rounds' ratios."""
    seconds: dict[str, list[float]] = {one.name: [] for one in contenders}
    for number in range(rounds + 1):  # in the first, processes start
        for one in contenders if number % 2 else contenders[::-1]:
            taken = one.seconds(kind, num_items)
            if number and taken is not None:
                seconds[one.name].append(taken)
    rates = {name: num_items / statistics.median(some) for name, some in seconds.items() if some}
    for ratio, other in RATIOS.items():
        if other in rates:
            pairs = zip(seconds[other], seconds[PROCESSES], strict=True)
            rates[ratio] = statistics.median([theirs / ours for theirs, ours in pairs])
    return rates


def _pictures(size: str) -> list[tuple[str, bytes]]:
    return [("image", item["image"]) for item in make_items(size, 8, [])]


def _clips(width: int, height: int) -> list[tuple[str, bytes]]:
    """H.264 of 60 frames in which a gradient moves."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(60):
            values = np.add.outer(np.arange(height), np.arange(width) + 7 * number).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.dstack([values, values.T.reshape(height, width), values]), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return [("video", buffer.getvalue())]


def _avif() -> list[tuple[str, bytes]]:
    items = []
    for item in make_items("image-448", 4, []):
        buffer = io.BytesIO()
        PIL.Image.open(io.BytesIO(item["image"])).save(buffer, "AVIF", speed=10)
        items.append(("image", buffer.getvalue()))
    return items


KINDS = {
    "clips, 320x240": lambda: _clips(320, 240),
    "clips, 1280x720": lambda: _clips(1280, 720),
    "pictures, 448x448 JPEG": lambda: _pictures("image-448"),
    "pictures, 1024x1280 JPEG": lambda: _pictures("image-1024x1280"),
    "pictures, 448x448 AVIF": _avif,
}

if __name__ == "__main__":
    main()
