"""What weights of 8 bits cost and save on a CPU: `python -m benchmarks.weights [CHECKPOINT]`.

sensitivities  what each part of the model loses if it is rounded, which the choice of the parts rests on (random
               weights of seed 0, `benchmarks.sensitivities`)
depth          cosine of int8 and of emulated fp8 to bfloat16 through all layers, and the memory of the loaded weights:
               of CHECKPOINT, or of random weights in the shape of the 2B with two other seeds (4.3 GB of disk), for
               texts, pictures and a mixture
speed          time of a query, of a batch of texts and of a picture, of copies of the shape with few layers, in turns
recall         of the bundled model: names on colors and on drawings
service        `bentoml serve` with int8: its resident memory, and the time of a query

Writes the record after each part, so that a part can be repeated: `--parts speed`. Exit status: 0 every goal is met, 1
not. fp8 has no product on a CPU, so its values are computed by an emulation, and its speed is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import cpu, invariance, output_types, report, sensitivities
from benchmarks.checkpoints import tokenizer, write_few_layers
from benchmarks.meter import footprint
from benchmarks.quality import ablations
from benchmarks.random_checkpoint import shape_config, write_checkpoint
from benchmarks.workloads import make_items, read_words
from embedder import Embedder

NAME = "weights"
PARTS = ("sensitivities", "depth", "speed", "recall", "service")
SEEDS = (1, 2)  # of `depth`: not the seed of the sensitivities
MIN_COSINE = 0.999
MAX_RESIDENT_GB = 3.0
MAX_LOST_POINTS = 0.5  # of recall, in percent
FORMATS: dict[str, dict[str, Any]] = {  # of `depth`; the first is what the others are compared with
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
    "fp8, emulated": {"dtype": "bfloat16", "weights": "fp8"},
}
RECALL_FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32": {"dtype": "float32", "weights": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "weights": "int8"},
    "fp8, emulated": {"dtype": "bfloat16", "weights": "fp8"},
}
SPEED_FORMATS = {name: one for name, one in RECALL_FORMATS.items() if name != "fp8, emulated"}
BATCHES = {"query": 1, "text-64": 16, "image-448": 1}  # items of each workload
TEXT_LAYERS, VISION_LAYERS = 4, 4

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a checkpoint folder; default: random weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=("tiny", "2b"), default="2b", help="of random weights, and of the speed")
    parser.add_argument("--rounds", type=int, default=9, help="of the speed")
    parser.add_argument("--count", type=int, help="use only the first COUNT colors and drawings")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    path = chosen.results / f"{NAME}.json"
    record: Record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    command = report.command(NAME, argparse.Namespace(**{**vars(chosen), "parts": None}))
    for part in chosen.parts:
        record = {**record, "environment": report.environment(command), part: _measure(part, chosen)}
        report.write(chosen.results, NAME, record, describe(record))
    print(describe(record))
    return int(not all(is_met for _, _, is_met in verdicts(record)))


@contextlib.contextmanager
def _checkpoint(chosen: argparse.Namespace, seed: int) -> Iterator[Path]:
    """The folder that was given, or a temporary one with random weights."""
    if chosen.checkpoint:
        yield chosen.checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        config = shape_config(chosen.shape, tokenizer())
        write_checkpoint(Path(folder), config, tokenizer(), seed=seed, dtype="bfloat16")
        yield Path(folder)


def _measure(part: str, chosen: argparse.Namespace) -> Record:
    if part == "speed":
        return measure_speed(chosen.shape, chosen.rounds)
    if part == "recall":
        return measure_recall(chosen.count)
    if part == "sensitivities":
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            sensitivities.write_narrow(Path(folder), chosen.shape)
            return sensitivities.measure_sensitivities(Path(folder))
    if part == "service":
        with _checkpoint(chosen, SEEDS[0]) as folder:
            return measure_service(folder)
    rows: Record = {}
    for seed in SEEDS[:1] if chosen.checkpoint else SEEDS:
        with _checkpoint(chosen, seed) as folder:
            rows["checkpoint" if chosen.checkpoint else f"seed {seed}"] = measure_depth(folder)
    return rows


# Fidelity and memory at full depth


def measure_depth(folder: Path) -> Record:
    """For each format the cosines to the first one and the memory, in a process of its own, so one after the other."""
    vectors: dict[str, NDArray[np.float32]] = {}
    rows: Record = {}
    for name, options in FORMATS.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            vectors[name], rows[name] = process.submit(embed_all, folder, options).result()
        cosines = (vectors[name] * next(iter(vectors.values()))).sum(1)
        rows[name] |= {"least_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    return rows


def embed_all(folder: Path, options: dict[str, Any]) -> tuple[NDArray[np.float32], Record]:
    """The vectors, and the memory in GB that this process needs for the loaded model. Run it in a new process."""
    torch.ones(8, 8) @ torch.ones(8, 8)  # loads the libraries
    before = resident()
    reset_peak()
    with emulated_fp8(), Embedder(str(folder), device="cpu", max_pixels=200_704, **options) as embedder:
        loaded, peak = resident(), peak_resident()
        vectors = np.stack(embedder.embed([item for item in invariance.items() if "video" not in item]))
        after = resident()
    return vectors, {
        "weights_gb": loaded["RssAnon"] - before["RssAnon"],
        "peak_loading_gb": peak - before["VmRSS"],
        "process_gb": after["VmRSS"],
    }


def resident() -> dict[str, float]:
    """Memory of this process in GB, by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e9 for line in lines if line[-1] == "kB"}


def reset_peak() -> None:
    """Let the peak of the resident memory start from now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident() -> float:
    return resident()["VmHWM"]


@contextlib.contextmanager
def emulated_fp8() -> Iterator[None]:
    """fp8 weights on the CPU."""
    from benchmarks.fake_cuda import emulated_scaled_mm  # imports torch's compiler

    with (
        mock.patch("embedder.loaded_model.check_weight_format"),
        mock.patch.object(torch, "_scaled_mm", emulated_scaled_mm),
    ):
        yield


# Speed


def measure_speed(shape: str, rounds: int) -> Record:
    """Milliseconds by workload and format, medians of rounds in which each format has its turn."""
    milliseconds: dict[str, dict[str, list[float]]] = {
        workload: {name: [] for name in SPEED_FORMATS} for workload in BATCHES
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_few_layers(folder, shape, text=TEXT_LAYERS, vision=VISION_LAYERS, dtype="bfloat16")
        embedders = {
            name: stack.enter_context(Embedder(str(folder), device="cpu", **options))
            for name, options in SPEED_FORMATS.items()
        }
        words = read_words(folder)
        items = {workload: make_items(workload, count, words) for workload, count in BATCHES.items()}
        for _ in tqdm(range(rounds + 1), desc="speed", unit="round"):  # the first one prepares products and prefixes
            for workload, batch in items.items():
                for name, embedder in embedders.items():
                    start = time.perf_counter()
                    embedder.embed(batch)
                    milliseconds[workload][name].append((time.perf_counter() - start) * 1e3)
    return {
        workload: {name: statistics.median(times[1:]) for name, times in by_format.items()}
        for workload, by_format in milliseconds.items()
    }


# Recall


def measure_recall(count: int | None) -> Record:
    """R@1, R@5 and MRR of the bundled model, for names on colors and on drawings, by format."""
    rows: Record = {}
    for name, options in RECALL_FORMATS.items():
        with emulated_fp8(), Embedder(device="cpu", **options) as embedder:
            pairs = ablations.embed_all(embedder, count)
        rows[name] = {}
        for kind, (names, pictures) in pairs.items():
            at = output_types.places(names, pictures, ablations.right_pairs(kind, len(names)))
            figures = {"recall_at_1": (at < 1).mean(), "recall_at_5": (at < 5).mean(), "mrr": (1 / (1 + at)).mean()}
            rows[name][kind] = {figure: float(value) for figure, value in figures.items()}
    return rows


# The service


def measure_service(folder: Path) -> Record:
    """Start the service with int8 weights and send some queries."""
    with tempfile.TemporaryDirectory() as logs:
        start = time.monotonic()
        with cpu.serving(str(folder), 60.0, Path(logs) / "log", {"WEIGHTS": "int8"}) as (url, pid):
            ready_s = time.monotonic() - start
            seconds = []
            with httpx.Client(base_url=url, timeout=60) as client:
                for _ in range(5):
                    start = time.monotonic()
                    client.post("/txt/embed", json={"input": "red"}).raise_for_status()
                    seconds.append(time.monotonic() - start)
                info = client.get("/info").json()
            num_bytes, _ = footprint(pid)
    return {
        "weights": info["weights"],
        "dtype": info["dtype"],
        "ready_s": ready_s,
        "query_ms": 1e3 * statistics.median(seconds),
        "resident_gb": num_bytes / 1e9,
    }


# The report


def verdicts(record: Record) -> list[tuple[str, str, bool]]:
    """What must be reached, what was, and whether that is enough, for the parts that were measured."""
    rows = []
    if depth := record.get("depth"):
        memory, cosine = most_memory(depth), least_cosine(depth)
        goal = f"resident int8 weights <= {MAX_RESIDENT_GB:g} GB"
        rows.append((goal, f"{memory:.2f} GB", memory <= MAX_RESIDENT_GB))
        rows.append((f"int8, lowest cosine to bfloat16 >= {MIN_COSINE}", f"{cosine:.5f}", cosine >= MIN_COSINE))
    if speed := record.get("speed"):
        ratio = slowest_ratio(speed)
        rows.append(("int8 faster than float32 for every workload", f"{ratio:.2f} of its time or less", ratio < 1))
    if recall := record.get("recall"):
        lost = lost_points(recall)
        rows.append(
            (f"int8 loses <= {MAX_LOST_POINTS} points of recall", f"{lost:.2f} points", lost <= MAX_LOST_POINTS)
        )
    return rows


def most_memory(depth: Record) -> float:
    """GB of the int8 weights, of the seed for which they take most."""
    return max(float(rows["int8"]["weights_gb"]) for rows in depth.values())


def least_cosine(depth: Record) -> float:
    """Of int8 to bfloat16, of all items and seeds."""
    return min(float(rows["int8"]["least_cosine"]) for rows in depth.values())


def slowest_ratio(speed: Record) -> float:
    """The largest time of int8 as the service computes it here, over that of float32."""
    return max(float(one["int8, bfloat16"] / one["float32"]) for one in speed.values())


def lost_points(recall: Record) -> float:
    """The largest loss of a recall by int8 against float32, in percentage points."""
    figures = [(kind, figure) for kind in recall["float32"] for figure in ("recall_at_1", "recall_at_5")]
    return max(
        100 * (recall["float32"][kind][figure] - recall[name][kind][figure])
        for name in ("int8, float32", "int8, bfloat16")
        for kind, figure in figures
    )


def describe(record: Record) -> str:
    """Markdown."""
    parts = []
    if found := verdicts(record):
        cells = [(goal, reached, "yes" if is_met else "**no**") for goal, reached, is_met in found]
        parts.append(report.table(("goal", "reached", "met"), cells))
    if losses := record.get("sensitivities"):
        kinds = list(sensitivities.GROUP_SIZES)
        headers = ("rounded part", "weights, M", *(f"1 - cosine, a scale for each {kind}" for kind in kinds))
        cells = [
            (part, report.number(one["weights"] / 1e6), *(f"{one[kind]:.5f}" for kind in kinds))
            for part, one in losses.items()
        ]
        parts.append(report.table(headers, cells))
    if depth := record.get("depth"):
        headers = ("all layers", "lowest cosine", "mean cosine", "weights, GB", "peak while loading, GB", "process, GB")
        figures = ("weights_gb", "peak_loading_gb", "process_gb")
        cells = [
            (
                f"{name}, {seed}",
                *(f"{one[key]:.5f}" for key in ("least_cosine", "mean_cosine")),
                *(f"{one[key]:.2f}" for key in figures),
            )
            for seed, rows in depth.items()
            for name, one in rows.items()
        ]
        parts.append(report.table(headers, cells))
    if speed := record.get("speed"):
        cells = [(workload, *(report.number(ms) for ms in one.values())) for workload, one in speed.items()]
        parts.append(report.table((f"ms, {TEXT_LAYERS} + {VISION_LAYERS} layers", *next(iter(speed.values()))), cells))
    if recall := record.get("recall"):
        kinds = list(recall["float32"])
        figures = ("recall_at_1", "recall_at_5", "mrr")
        cells = [
            (name, *(" / ".join(f"{one[kind][figure]:.4f}" for figure in figures) for kind in kinds))
            for name, one in recall.items()
        ]
        parts.append(report.table(("bundled model", *(f"{kind}: R@1 / R@5 / MRR" for kind in kinds)), cells))
    if service := record.get("service"):
        cells = [(name, one if isinstance(one, str) else report.number(one)) for name, one in service.items()]
        parts.append(report.table(("service", "int8"), cells))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
