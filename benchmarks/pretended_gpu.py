"""Is one worker process fast enough for a GPU? `python -m benchmarks.pretended_gpu` asks without one.

The service runs with a simulated GPU. It computes a batch in the time that `FULL_MS` says, about the roofline of an
H200, and the Python of launching a batch is that of a 2B's layers. For each layout, it prints how much of the time the
device is busy while callers send as much as it takes, the CPU time of an item, and how long a query waits next to them.
`one call`: as if one call launched a whole batch, as a CUDA graph or a compiled model does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import report
from benchmarks.checkpoints import tokenizer
from benchmarks.contenders import Contender, service
from benchmarks.load import NO_GZIP, Load, drive
from benchmarks.meter import cpu_seconds
from benchmarks.protocols import LocalProtocol
from benchmarks.random_checkpoint import shape_config, write_checkpoint
from benchmarks.workloads import make_items, read_words

FILE = "pretended_gpu"
NARROW_TEXT = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
NARROW_TEXT |= {"intermediate_size": 64, "mrope_section": [3, 3, 2]}
NARROW_VISION = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 64}
LOADS = {  # workload, items a request, callers
    "32 texts of 64 tokens": ("text-64", 32, 24),
    "single texts of 16 tokens": ("text-16", 1, 256),
}
FULL_MS = {"2B": 73.0, "8B": 290.0}  # for 16,384 tokens, the most of a batch
HEADERS = ("load", "model", "workers", "launch", "items/s", "device busy", "CPU ms an item", "a query's p50", "p99")


@dataclass(frozen=True)
class Layout:
    """Worker processes that share the device, and how they launch a batch."""

    workers: int
    launch: str
    model: str = "2B"


LAYOUTS = (
    Layout(1, "layer by layer"),
    Layout(1, "one call"),
    Layout(1, "one call", "8B"),
    Layout(2, "layer by layer"),
    Layout(2, "one call"),
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command(FILE, chosen))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, shape_config("2b", tokenizer(), text=NARROW_TEXT, vision=NARROW_VISION), tokenizer())
        for layout in tqdm(LAYOUTS, desc="layouts"):
            rows += run_layout(layout, folder, chosen.seconds)
    data = {"environment": about, "rows": rows}
    report.save(chosen.results, FILE, data, table(rows), {}, "")
    print(table(rows))
    return data


def run_layout(layout: Layout, checkpoint: Path, seconds: float) -> list[dict[str, Any]]:
    """Each load on one service."""
    words = read_words(checkpoint)
    query = LocalProtocol().bodies(make_items("text-16", 1, words), 1)
    with tempfile.TemporaryDirectory() as name:
        device = Path(name)
        (device / "busy-until").write_bytes(struct.pack("d", 0.0))
        one = service("service", "benchmarks.pretended_gpu_service:Qwen3VLEmbedding", checkpoint, "/txt/embed")
        one.environment = {
            **one.environment,
            "BENCHMARK_DEVICE": name,
            "BENCHMARK_FULL_MS": str(FULL_MS[layout.model]),
            "BENCHMARK_LAUNCH": layout.launch,
            "EMBEDDER_WORKERS": str(layout.workers),
        }
        try:
            one.start(query[0])
            return [_run_load(load, layout, one, device, words, query, seconds) for load in LOADS]
        finally:
            one.stop()


def _run_load(
    name: str, layout: Layout, one: Contender, device: Path, words: list[str], query: list[bytes], seconds: float
) -> dict[str, Any]:
    workload, size, num_callers = LOADS[name]
    bodies = LocalProtocol().bodies(make_items(workload, 512, words), size)
    assert one.process is not None
    asyncio.run(drive(one.url, bodies, concurrency=num_callers, seconds=1, headers=NO_GZIP))  # warms up
    begin_s, before_s = time.monotonic(), cpu_seconds(one.process.pid)
    bulk, queries = asyncio.run(_drive_both(one.url, bodies, num_callers, query, seconds))
    wall_s, cpu_s = time.monotonic() - begin_s, cpu_seconds(one.process.pid) - before_s
    lines = map(json.loads, (device / "batches").read_text(encoding="utf-8").splitlines())
    busy_s = sum(batch["busy_s"] for batch in lines if begin_s < batch["end_s"] <= begin_s + wall_s)
    num_items = len(bulk.latencies_s) * size
    return {
        "load": name,
        "model": layout.model,
        "workers": layout.workers,
        "launch": layout.launch,
        "items_per_s": num_items / wall_s,
        "busy": busy_s / wall_s,
        "cpu_ms": cpu_s / num_items * 1e3,
        "p50_ms": float(np.percentile(queries.latencies_s, 50)) * 1e3,
        "p99_ms": float(np.percentile(queries.latencies_s, 99)) * 1e3,
    }


async def _drive_both(
    url: str, bodies: list[bytes], num_callers: int, query: list[bytes], seconds: float
) -> tuple[Load, Load]:
    bulk = drive(url, bodies, concurrency=num_callers, seconds=seconds, headers=NO_GZIP)
    return await asyncio.gather(bulk, drive(url, query, concurrency=1, seconds=seconds, headers=NO_GZIP))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        (
            *(row["load"], row["model"], row["workers"], row["launch"], report.number(row["items_per_s"])),
            *(f"{row['busy']:.0%}", f"{row['cpu_ms']:.3f}", f"{row['p50_ms']:.0f} ms", f"{row['p99_ms']:.0f} ms"),
        )
        for row in rows
    ]
    return report.table(HEADERS, lines)


if __name__ == "__main__":
    main()
