"""Compare the library with its peers on the same weights: `python -m benchmarks.library [--dtype bfloat16]`.

The peers are transformers, used as in the reference code, and sentence-transformers. Each runs in its own process. The
limit is the rate of a large matrix product, the fastest that torch has, measured between the rounds. In bfloat16, the
library in float32 is one more peer.

The run stops if a peer's vectors are wrong. In float32, every vector must match ours. In bfloat16, two correct
implementations differ by more than a fixed cosine allows, so each peer's mean distance to float32 vectors must be at
most 1.5 times that of transformers.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import peers, report
from benchmarks.checkpoints import random_folder
from benchmarks.compare import Comparison, compare
from benchmarks.limits import Weights, matrix_rate
from benchmarks.workloads import WORKLOADS, read_words
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.settings import Settings

SHARES = {"share of limit": "share_of_limit", "with attention": "share_with_attention"}
HEADERS = ("workload", "who", "items/s", "tokens/s", "ms a call", "x transformers", *SHARES, "lowest cosine")
PEAK = "GiB beyond weights"  # only on devices with their own memory
NOT_INSTALLED = "not installed"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    chosen = _parse(arguments)
    about = report.environment(report.command("library", chosen))
    dtype, device = peers.DTYPES[chosen.dtype], torch.device("cpu")
    with random_folder(chosen.shape) as folder:
        contestants, weights = _load(folder, dtype, device)
        oracle = None
        if dtype != torch.float32:
            oracle = peers.apart("float32", peers.loaded_transformers, folder, torch.float32, device)
        words = read_words(folder)
        preprocessor = load_preprocessor(folder)
        rows = []
        for name in tqdm(chosen.workloads, desc="workloads", unit="workload"):
            comparison = compare(
                name,
                contestants,
                words,
                rounds=chosen.rounds,
                seconds=chosen.seconds,
                limit=lambda: matrix_rate(dtype, device),
                oracle=oracle,
            )
            rows.append(figures(comparison, weights, preprocessor))
        for peer in (*contestants, *([oracle] if oracle else [])):
            peer.close()
    data = {"environment": about, "workloads": rows}
    text = table(rows)
    report.save(chosen.results, f"library-{chosen.shape}-{chosen.dtype}", data, text, bars(rows), "times transformers")
    print(text)
    return data


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the library with transformers and sentence-transformers.")
    parser.add_argument("--shape", choices=("tiny", "small"), default="small")
    parser.add_argument("--dtype", choices=peers.DTYPES, default="float32")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60, help="per workload, for all rounds of all peers")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    return parser.parse_args(arguments)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[list[peers.Peer], Weights]:
    makers = {peers.OURS: peers.ours, peers.TRANSFORMERS: peers.loaded_transformers}
    if peers.is_installed("sentence_transformers"):
        makers[peers.SENTENCE_TRANSFORMERS] = peers.sentence_transformers
    contestants = [peers.apart(name, make, folder, dtype, device) for name, make in makers.items()]
    if dtype != torch.float32:
        contestants.append(peers.apart(peers.OURS_IN_FLOAT32, peers.ours, folder, torch.float32, device))
    return contestants, Weights.of(peers.load_model(folder, dtype, device))


def load_preprocessor(folder: Path) -> Preprocessor:
    """A preprocessor of `folder`, to count tokens and patches."""
    settings = Settings.model_validate({"model": str(folder)})
    return Preprocessor(load_tokenizer(folder), read_vision_config(folder, settings), settings)


def figures(comparison: Comparison, weights: Weights, preprocess: Preprocessor) -> dict[str, Any]:
    """The result of one workload as JSON: medians, ratios to transformers, and shares of the matrix rate.

    Without transformers, the ratios are NaN.
    """
    seen = cache(lambda kind, content: preprocess(item_from_fields({kind: content})))  # the same images repeat
    inputs = [seen(*pair) for item in comparison.items for pair in item.items()]
    num_items = len(inputs)
    flops, attention = weights.flops(inputs) / num_items, weights.attention_flops(inputs) / num_items
    tokens = sum(one.num_tokens for one in inputs) / num_items
    limit = statistics.median(comparison.limits)
    baseline = comparison.timings.get(peers.TRANSFORMERS)
    who = {
        name: {
            "items_per_s": timing.items_per_s,
            "tokens_per_s": timing.items_per_s * tokens,
            "call_ms": timing.median_s * 1e3,
            "ratio": timing.items_per_s / baseline.items_per_s if baseline else math.nan,
            "share_of_limit": timing.items_per_s * flops / limit,
            "share_with_attention": timing.items_per_s * (flops + attention) / limit,
            "min_cosine": timing.min_cosine,
            "peak_gib": timing.peak_bytes / 2**30,
            "seconds": [round(second, 6) for second in timing.seconds],
        }
        for name, timing in comparison.timings.items()
    }
    return {
        "workload": comparison.workload,
        "num_items": num_items,
        "tokens_per_item": tokens,
        "gflop_per_item": flops / 1e9,
        "attention_gflop_per_item": attention / 1e9,
        "limit_gflop_per_s": limit / 1e9,
        "who": who,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    has_peak = any(one["peak_gib"] for row in rows for one in row["who"].values())
    lines: list[list[object]] = []
    for row in rows:
        first = f"{row['workload']} x {row['num_items']}"
        for name, one in row["who"].items():
            shown = [one["items_per_s"], one["tokens_per_s"], one["call_ms"], one["ratio"]]
            shares = [f"{one[share]:.0%}" for share in SHARES.values()]
            lines.append([first, name, *map(report.number, shown), *shares, f"{one['min_cosine']:.6f}"])
            lines[-1] += [report.number(one["peak_gib"])] if has_peak else []
            first = ""
        if peers.SENTENCE_TRANSFORMERS not in row["who"]:
            lines.append(["", peers.SENTENCE_TRANSFORMERS, NOT_INSTALLED, *[""] * 6])
        lines.append(["", "limit: matrix product", "", "", "", "", f"{row['limit_gflop_per_s']:.0f} GFLOP/s", "", ""])
    return report.table((*HEADERS, PEAK) if has_peak else HEADERS, lines)


def bars(rows: Sequence[dict[str, Any]]) -> report.Bars:
    return {row["workload"]: {name: one["ratio"] for name, one in row["who"].items()} for row in rows}


if __name__ == "__main__":
    main()
