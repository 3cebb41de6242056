"""Check that time per item and memory stay flat from 1,000 to 100,000 items: `python -m benchmarks.growth`.

It uses the `tiny` shape. A run of the library is one call of `embed`; the memory of the returned vectors is subtracted.
Memory is the median of a run's second half, which ignores the memory of single batches. Time is CPU time of the
process, because wall time on a shared machine includes other processes. The smallest size runs again at the end,
because the speed of a shared machine changes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

from benchmarks import contenders, report
from benchmarks.checkpoints import random_folder
from benchmarks.load import drive
from benchmarks.meter import Meter, medians
from benchmarks.workloads import make_items, read_words
from embedder.embedder import Embedder

SIZES = (1_000, 10_000, 100_000)
NUM_TEXTS = 1_000  # distinct texts
PER_REQUEST, CALLERS = 32, 16
MAX_TIME_RATIO = 1.2  # CPU time per item of the largest size, over the slower run of the smallest
VECTORS_HELD = 0.75  # the average share of the vectors that exist during the second half of a run
MAX_GROWTH_MB = 64  # memory of the largest size over the smallest, without the vectors
HEADERS = ("where", "items", "seconds", "ms an item", "CPU ms an item", "peak MB", "held MB", "vectors MB")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Time and memory per item as the number of items grows.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--where", nargs="+", choices=("library", "server"), default=["library", "server"])
    parser.add_argument("--warm-up", type=int, default=10_000, help="items before the first run")
    parser.add_argument("--seconds", type=float, default=900, help="limit per size")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command("growth", chosen))
    with random_folder("tiny") as folder:
        texts = [item["text"] for item in make_items("text-mixed", NUM_TEXTS, read_words(folder))]
        rows: list[dict[str, Any]] = []
        sizes = [*sorted(chosen.sizes), min(chosen.sizes)]
        if "library" in chosen.where:
            rows += _library(folder, texts, sizes, chosen.warm_up)
        if "server" in chosen.where:
            rows += _server(folder, texts, sizes, chosen.warm_up, chosen.seconds)
    verdicts = {where: _verdict([row for row in rows if row["where"] == where]) for where in chosen.where}
    data = {"environment": about, "rows": rows, "verdicts": verdicts}
    text = _table(rows) + "\n\n" + "\n".join(f"{where}: {one['text']}" for where, one in verdicts.items())
    bars = {
        f"{size}": {row["where"]: row["item_cpu_ms"] for row in reversed(rows) if row["items"] == size}  # first run
        for size in chosen.sizes
    }
    report.save(chosen.results, "growth", data, text, bars, "CPU ms an item")
    print(text)
    return data


def _library(folder: Path, texts: list[str], sizes: list[int], warm_up: int) -> Iterator[dict[str, Any]]:
    with Embedder(str(folder), device="cpu", dtype="float32") as embedder:
        first = embedder.embed(_repeat(texts, warm_up))
        for size in sizes:
            with Meter() as meter:
                start = time.perf_counter()
                vectors = embedder.embed(tqdm(_repeat(texts, size), total=size, desc="library", unit="item"))
                seconds = time.perf_counter() - start
            same = all(np.abs(vectors[index] - first[index]).max() <= 1e-5 for index in range(min(size, len(first))))
            assert same, "vectors changed"
            assert np.abs(vectors[-1] - vectors[(size - 1) % len(texts)]).max() <= 1e-5, "vectors changed"
            vectors_mb = sum(map(sys.getsizeof, vectors)) / 1e6
            del vectors
            yield _row("library", size, seconds, meter, vectors_mb)


def _repeat(texts: list[str], count: int) -> Iterator[str]:
    return (texts[index % len(texts)] for index in range(count))


def _server(folder: Path, texts: list[str], sizes: list[int], warm_up: int, seconds: float) -> Iterator[dict[str, Any]]:
    service = contenders.service(contenders.OURS, ".", folder, "/txt/embed")
    groups = [
        texts[start : start + PER_REQUEST] for start in range(0, len(texts) // PER_REQUEST * PER_REQUEST, PER_REQUEST)
    ]
    bodies = [orjson.dumps({"input": group}) for group in groups]
    try:
        service.start(bodies[0])
        asyncio.run(drive(service.url, bodies, concurrency=CALLERS, seconds=60, max_requests=warm_up // PER_REQUEST))
        assert service.process is not None
        for size in tqdm(sizes, desc="server", unit="size"):
            wanted = size // PER_REQUEST
            with Meter(service.process.pid) as meter:
                load = asyncio.run(
                    drive(service.url, bodies, concurrency=CALLERS, seconds=seconds, max_requests=wanted)
                )
            assert len(load.latencies_s) == wanted, f"{len(load.latencies_s)} of {wanted} requests were answered"
            yield _row("server", wanted * PER_REQUEST, load.wall_s, meter, 0.0, size)
    finally:
        service.stop()


def _row(where: str, num_items: int, seconds: float, meter: Meter, vectors_mb: float, size: int = 0) -> dict[str, Any]:
    return {
        "where": where,
        "items": size or num_items,
        "seconds": seconds,
        "item_ms": seconds / num_items * 1e3,
        "item_cpu_ms": meter.cpu_s / num_items * 1e3,
        "peak_mb": meter.peak_bytes / 1e6,
        "held_mb": medians(meter.samples, 2)[-1] / 1e6,
        "vectors_mb": vectors_mb,
    }


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the largest size with both runs of the smallest."""
    before, largest, after = rows[0], rows[-2], rows[-1]
    time_ratio = largest["item_cpu_ms"] / max(before["item_cpu_ms"], after["item_cpu_ms"])
    growth_mb = largest["held_mb"] - VECTORS_HELD * largest["vectors_mb"] - before["held_mb"]
    is_flat = time_ratio <= MAX_TIME_RATIO and growth_mb <= MAX_GROWTH_MB
    text = (
        f"{'flat' if is_flat else 'NOT flat'}: CPU time per item {time_ratio:.2f}x (allowed {MAX_TIME_RATIO}x), "
        f"memory beyond the vectors {growth_mb:+.0f} MB (allowed {MAX_GROWTH_MB} MB)"
    )
    return {"time_ratio": time_ratio, "growth_mb": growth_mb, "is_flat": is_flat, "text": text}


def _table(rows: list[dict[str, Any]]) -> str:
    keys = ("seconds", "item_ms", "item_cpu_ms", "peak_mb", "held_mb", "vectors_mb")
    return report.table(
        HEADERS, [[row["where"], row["items"], *(report.number(row[key]) for key in keys)] for row in rows]
    )


if __name__ == "__main__":
    raise SystemExit(not all(one["is_flat"] for one in main()["verdicts"].values()))
