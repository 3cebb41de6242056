"""Measure what decoding in separate processes costs: `python -m benchmarks.decoding`.

Two engines preprocess the same good clips and pictures in turns, with a model that computes nothing: one decodes in
processes what the service decodes there, the other decodes everything in its threads, as before there were processes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
from tqdm import tqdm

from benchmarks import report
from benchmarks.checkpoints import random_folder
from benchmarks.library import load_preprocessor
from benchmarks.workloads import make_items
from embedder.engine import preprocess_workers
from embedder.engine.device import WaitForRows
from embedder.engine.engine import Engine
from embedder.inputs.items import EmbeddingItem, Image, Video
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.settings import Settings

HIDDEN_SIZE = 64
PICTURES_PER_CLIP = 8
PROCESSES, THREADS, RATIO = "in processes", "in threads", "processes / threads"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Clips and pictures per second, decoded in processes and in threads.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--num-items", type=int, default=24, help="clips of each kind in a round; of pictures there are more"
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command("decoding", chosen))
    with random_folder("tiny") as folder:
        preprocess = load_preprocessor(folder)
    items = {kind: make() for kind, make in KINDS.items()}
    rates = {}
    for kind, some in tqdm(items.items(), desc="kinds", unit="kind"):
        num_items = chosen.num_items * (1 if kind.startswith("clips") else PICTURES_PER_CLIP)
        rates[kind] = _rates([some[number % len(some)] for number in range(num_items)], preprocess, chosen.rounds)
    rows = [
        [kind, *(report.number(one[name]) for name in (PROCESSES, THREADS)), f"{one[RATIO]:.2f}"]
        for kind, one in rates.items()
    ]
    text = report.table(("items/s", PROCESSES, THREADS, "ratio, median of the rounds"), rows)
    data = {"environment": about, "items_per_s": rates}
    bars = {kind: {name: one[name] for name in (PROCESSES, THREADS)} for kind, one in rates.items()}
    report.save(chosen.results, "decoding", data, text, bars, "items per second")
    print(text)
    return data


def _rates(items: list[EmbeddingItem], preprocess: Preprocessor, rounds: int) -> dict[str, float]:
    """Items per second in both ways, and the median of the rounds' ratios."""
    engines = {name: _engine(preprocess, has_processes=name == PROCESSES) for name in (PROCESSES, THREADS)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for round_number in range(rounds + 1):  # in the first, processes start
            for name in sorted(engines, reverse=bool(round_number % 2)):
                begin_s = time.perf_counter()
                for future in [engines[name].submit(item) for item in items]:
                    future.result()
                seconds[name] += [time.perf_counter() - begin_s] if round_number else []
    finally:
        for engine in engines.values():
            engine.close()
    rates = {name: len(items) / statistics.median(one) for name, one in seconds.items()}
    ratios = [threads / processes for processes, threads in zip(seconds[PROCESSES], seconds[THREADS], strict=True)]
    return {**rates, RATIO: statistics.median(ratios)}


def _engine(preprocess: Preprocessor, *, has_processes: bool) -> Engine:
    with mock.patch.object(preprocess_workers, "can_start_processes", return_value=has_processes):
        return Engine(preprocess, _compute_nothing, HIDDEN_SIZE, Settings())


def _compute_nothing(inputs: list[ModelInput]) -> WaitForRows:
    rows = np.ones((len(inputs), HIDDEN_SIZE), np.float32)
    return lambda: rows


def _pictures(size: str) -> list[EmbeddingItem]:
    return [EmbeddingItem((Image(item["image"]),)) for item in make_items(size, 8, [])]


def _clips(width: int, height: int) -> list[EmbeddingItem]:
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
    return [EmbeddingItem((Video(buffer.getvalue()),))]


def _avif() -> list[EmbeddingItem]:
    import PIL.Image

    items = []
    for item in make_items("image-448", 4, []):
        buffer = io.BytesIO()
        PIL.Image.open(io.BytesIO(item["image"])).save(buffer, "AVIF", speed=10)
        items.append(EmbeddingItem((Image(buffer.getvalue()),)))
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
