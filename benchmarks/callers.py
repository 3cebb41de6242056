"""A caller's short texts while another caller floods the service: `python -m benchmarks.callers`.

The other caller sends one kind of requests after the other, each from many connections, once with the same API key as
the short texts, so that both are one caller to the service, and once with a key of its own.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contenders, report
from benchmarks.load import Load, drive
from benchmarks.protocols import LocalProtocol
from benchmarks.workloads import make_items, read_words
from embedder.model.checkpoint import BUNDLED

FILE = "callers"
KEYS = ("first", "second")
FLOODS = {
    "texts of 16 tokens": ("/txt/embed", "text-16", 1),  # by name: path, workload, items of a request
    "texts of 512 tokens": ("/txt/embed", "text-512", 1),
    "32 texts of 64 tokens a request": ("/txt/embed", "text-64", 32),
    "448 px pictures": ("/img/embed", "image-448", 1),
}
HEADERS = ("the other caller sends", "its key", "short text, p50, ms", "p90, ms", "items/s of the other caller")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of each row")
    parser.add_argument("--connections", type=int, default=512, help="of the other caller")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command(FILE, chosen))
    words = read_words(BUNDLED)
    texts = LocalProtocol().bodies(make_items("text-16", 64, words), 1)
    service = contenders.service(contenders.OURS, ".", BUNDLED, "/txt/embed")
    service.environment = {**service.environment, "EMBEDDER_API_KEY": ",".join(KEYS)}
    service.headers = _key(KEYS[0])
    rows = []
    try:
        service.start(texts[0])
        alone = asyncio.run(drive(service.url, texts, concurrency=1, seconds=chosen.seconds, headers=_key(KEYS[0])))
        rows.append(_row("nothing", "", alone, 0.0))
        for name, (path, workload, size) in FLOODS.items():
            url = f"http://127.0.0.1:{service.port}{path}"
            bodies = LocalProtocol().bodies(make_items(workload, 256, words), size)
            for key, whose in zip(KEYS, ("the same", "another"), strict=True):
                flood, queries = asyncio.run(_both(url, bodies, key, service.url, texts, chosen))
                rows.append(_row(name, whose, queries, flood.requests_per_s * size))
    finally:
        service.stop()
    data = {"environment": about, "rows": rows}
    text = report.table(HEADERS, [_cells(row) for row in rows])
    bars = {row["flood"]: {one["key"]: one["p50_ms"] for one in rows if one["flood"] == row["flood"]} for row in rows}
    report.save(chosen.results, FILE, data, text, bars, "ms of a short text, p50")
    print(text)
    return data


async def _both(
    flood_url: str, bodies: Sequence[bytes], key: str, url: str, texts: Sequence[bytes], chosen: argparse.Namespace
) -> tuple[Load, Load]:
    """A flood with this key, and at the same time one caller's short texts with the first key."""
    return await asyncio.gather(
        drive(flood_url, bodies, concurrency=chosen.connections, seconds=chosen.seconds, headers=_key(key)),
        drive(url, texts, concurrency=1, seconds=chosen.seconds, headers=_key(KEYS[0])),
    )


def _key(key: str) -> dict[str, str]:
    return {"x-api-key": key}


def _row(flood: str, key: str, queries: Load, items_per_s: float) -> dict[str, Any]:
    if not queries.latencies_s:
        raise RuntimeError(f"{flood}, {key} key: no short text was embedded; give more --seconds")
    p50_s, p90_s = np.percentile(queries.latencies_s, (50, 90))
    return {
        "flood": flood,
        "key": key,
        "p50_ms": float(p50_s) * 1e3,
        "p90_ms": float(p90_s) * 1e3,
        "items_per_s": items_per_s,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    rate = f"{row['items_per_s']:.0f}" if row["items_per_s"] else ""
    return [row["flood"], row["key"], f"{row['p50_ms']:.0f}", f"{row['p90_ms']:.0f}", rate]


if __name__ == "__main__":
    main()
