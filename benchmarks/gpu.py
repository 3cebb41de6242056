"""Everything that needs a GPU, in one command of at most 8 minutes: `python -m benchmarks.gpu`.

1. Each attention back end against the oracle (plain transformers, float32, CPU) on small random checkpoints, and a
   vector's dependence on its batch.
2. The 2B and 8B shapes with random weights, made on the device and never written to disk, through every workload,
   against transformers and sentence-transformers; shares of the matrix rate and of the copy rate measured in the run;
   how long the GPU waits between kernels; peak memory.

Needs torch >= 2.11, transformers >= 5.17, sentence-transformers and the small dependencies (av, httpcore, matplotlib,
orjson, psutil, pybase64, pydantic, qwen-vl-utils, tqdm), not BentoML. A machine without registries gets those as
wheels. A fault in one part is recorded, the rest goes on, and the exit status is 1. `--device cpu --shapes tiny` tries
the script itself.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import library, peers, report
from benchmarks.checkpoints import random_folder, tokenizer
from benchmarks.compare import compare, unit
from benchmarks.gaps import launch_gaps
from benchmarks.limits import Weights, copy_rate, matrix_rate
from benchmarks.random_checkpoint import SHAPES, shape_config
from benchmarks.workloads import WORKLOADS, make_items, read_words
from embedder.torchvision_shim import declare_torchvision_operators
from tests.oracle import Oracle

declare_torchvision_operators()

from transformers import Qwen3VLModel  # noqa: E402 - after the declaration

BACK_ENDS: dict[str, tuple[dict[str, Any], ...]] = {
    "cuda": (
        {"attention": "varlen"},
        {"attention": "varlen", "cuda_graphs": True},
        {"attention": "varlen", "torch_compile": True},
        {"attention": "flash_attn"},
    ),
    "cpu": ({"attention": "sdpa"},),
}
ORACLE_SHAPES = ("tiny", "small")
MIN_COSINE = 0.99  # between two bfloat16 forwards of up to 36 random layers; the oracle judges, this finds mix-ups
MAX_BATCH_DIFFERENCE = {torch.bfloat16: 4e-3, torch.float32: 1e-6}
ROUNDS = 3
CHECKED = ("text-16", "text-mixed", "image-256", "half-half")
PROFILED = ("query", "text-64", "text-512", "image-448")  # whose launch gaps are measured


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    chosen = _parse(arguments)
    about = report.environment(report.command("gpu", chosen))
    deadline = time.monotonic() + chosen.seconds
    device = torch.device(chosen.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    faults: list[str] = []
    rates = {"matrix_flop_per_s": matrix_rate(dtype, device)}
    rates["copy_bytes_per_s"] = copy_rate(device, 2**31 if device.type == "cuda" else 2**27)
    checks: list[dict[str, Any]] = []
    for shape in ORACLE_SHAPES[: 1 if device.type == "cpu" else None]:
        checks += _guard(faults, f"oracle, {shape}", partial(_check_back_ends, shape, device, dtype)) or []
    shapes: dict[str, Any] = {}
    for index, shape in enumerate(chosen.shapes):
        left = (deadline - time.monotonic()) / (len(chosen.shapes) - index)
        shapes[shape] = _run_shape(shape, device, dtype, chosen.workloads, left, rates, faults)
    faults += [f"oracle: {one}" for one in checks if one["result"] == "WRONG"]
    data = {
        "environment": about,
        "dtype": str(dtype).removeprefix("torch."),
        "rates": rates,
        "checks": checks,
        "shapes": shapes,
        "faults": faults,
    }
    text = _text(data)
    bars = {
        f"{shape} {row}": ratios for shape, one in shapes.items() for row, ratios in library.bars(one["rows"]).items()
    }
    report.save(
        chosen.results, "gpu" if device.type == "cuda" else "gpu-script-on-cpu", data, text, bars, "x transformers"
    )
    print(text)
    return data


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["2b", "8b"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=420, help="for everything; starting takes another minute")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    return parser.parse_args(arguments)


def _guard(faults: list[str], what: str, run: Callable[[], Any]) -> Any:
    """What `run` gives; a fault is noted and costs only this part."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        faults.append(f"{what}: {type(error).__name__}: {str(error)[:500]}")
        return None


def _check_back_ends(shape: str, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Distance to the oracle over every kind of item, for each back end that is installed, and what a batch changes.

    Distance is 1 - cosine, the mean over all items. Right is at most 1.5 times that of transformers in the same dtype.
    """
    checks: list[dict[str, Any]] = []
    with random_folder(shape) as folder:
        words = read_words(folder)
        items = [item for name in CHECKED for item in make_items(name, 6, words)]
        expected = Oracle(folder).embed([_oracle_item(item) for item in items])
        theirs = peers.padded_transformers(folder, peers.load_model(folder, dtype, device)).embed(items)
        allowed = 1.5 * _distance(theirs, expected) + 1e-6
        for options in BACK_ENDS[device.type]:
            name = options["attention"]
            if "torch_compile" in options and not shutil.which("cc"):
                continue
            if name == "flash_attn" and not peers.is_installed("flash_attn"):
                checks.append({"shape": shape, "attention": name, "result": library.NOT_INSTALLED})
                continue
            ours = peers.ours(folder, dtype, device, **options)
            together = ours.embed(items)
            alone = np.concatenate([ours.embed([item]) for item in items])
            ours.close()
            distance, difference = _distance(together, expected), float(np.abs(together - alone).max())
            is_right = distance <= allowed and difference <= MAX_BATCH_DIFFERENCE[dtype]
            checks.append(
                {
                    "shape": shape,
                    "attention": ", ".join([name, *(peers.OPTIONS[one] for one in options if one in peers.OPTIONS)]),
                    "result": "right" if is_right else "WRONG",
                    "distance": distance,
                    "allowed": allowed,
                    "batch_difference": difference,
                }
            )
    return checks


def _distance(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((1 - (unit(vectors) * unit(expected)).sum(1)).mean())


def _oracle_item(item: dict[str, Any]) -> dict[str, Any]:
    return {"image": peers.decode(item["image"])} if "image" in item else item


def _make_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Qwen3VLModel with random weights of the checkpoint writer's kind, made where they are used."""
    config = shape_config(shape, tokenizer())
    with torch.device(device):
        model = Qwen3VLModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(0)
    std = config.get_text_config().initializer_range
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.0, std, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data += 1
    return model.eval().requires_grad_(False)


def _run_shape(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    workloads: Sequence[str],
    seconds: float,
    rates: dict[str, float],
    faults: list[str],
) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    gaps: dict[str, Any] = {}
    with random_folder("tiny") as folder:  # its tokenizer and processor; its weights are not read
        loaded = _guard(faults, f"{shape}: loading", lambda: _load(folder, shape, device, dtype))
        if loaded is None:
            return {"rows": rows, "gaps": gaps}
        contestants, weights, weight_bytes = loaded
        words, preprocess = read_words(folder), library.load_preprocessor(folder)
        for index, name in enumerate(tqdm(workloads, desc=shape, unit="workload")):
            left = (deadline - time.monotonic()) / (len(workloads) - index)
            measure = partial(
                compare,
                name,
                contestants,
                words,
                rounds=ROUNDS,
                seconds=max(left * 0.6, 1.0),  # the rest: probing, checking, profiling
                limit=partial(matrix_rate, dtype, device),
                min_cosine=MIN_COSINE,
            )
            comparison = _guard(faults, f"{shape}: {name}", measure)
            row = library.figures(comparison, weights, preprocess) if comparison else None
            if row:
                row["copy_limit_ms"] = weight_bytes / rates["copy_bytes_per_s"] * 1e3
                rows.append(row)
            if row and name in PROFILED and device.type == "cuda":
                items = make_items(name, 1 if name == "query" else row["num_items"], words)
                found = _guard(
                    faults,
                    f"{shape}: gaps of {name}",
                    partial(launch_gaps, partial(contestants[0].embed, items)),
                )
                gaps |= {name: found} if found else {}
        for peer in contestants:
            peer.close()
    return {"rows": rows, "gaps": gaps, "weight_gb": weight_bytes / 1e9}


def _load(folder: Path, shape: str, device: torch.device, dtype: torch.dtype) -> tuple[list[peers.Peer], Weights, int]:
    """Two copies of the same weights: ours may rearrange its own."""
    model, theirs = _make_model(shape, device, dtype), _make_model(shape, device, dtype)
    contestants = [peers.ours(folder, dtype, device, model)]
    if device.type == "cuda":
        contestants.append(peers.ours(folder, dtype, device, model, cuda_graphs=True))
        if shutil.which("cc"):  # which Triton wants
            contestants.append(peers.ours(folder, dtype, device, model, torch_compile=True))
    contestants.append(peers.padded_transformers(folder, theirs))
    if peers.is_installed("flash_attn"):
        flash = _make_model(shape, device, dtype)
        flash.set_attn_implementation("flash_attention_2")
        contestants.append(peers.padded_transformers(folder, flash, "transformers, flash-attn"))
    if peers.is_installed("sentence_transformers"):
        contestants.append(peers.sentence_transformers(folder, dtype, device, theirs))
    weights = Weights.of(theirs)
    return contestants, weights, weights.per_token * theirs.dtype.itemsize


def _text(data: dict[str, Any]) -> str:
    rates = data["rates"]
    parts = [
        f"{data['dtype']}: matrix product {rates['matrix_flop_per_s'] / 1e12:.3g} TFLOP/s, "
        f"copy {rates['copy_bytes_per_s'] / 1e12:.3g} TB/s.",
        report.table(
            ("shape", "attention", "result", "1 - cosine to the oracle", "allowed", "alone against in a batch"),
            [[one["shape"], one["attention"], one["result"], *_shown(one)] for one in data["checks"]],
        ),
    ]
    for shape, one in data["shapes"].items():
        parts += [f"{shape}:", library.table(one["rows"])]
        if one["gaps"]:
            parts.append(report.table(_GAP_HEADERS, [[name, *gap.values()] for name, gap in one["gaps"].items()]))
        for row in one["rows"]:
            if row["workload"] == "query":
                p50 = statistics.median(row["who"][peers.OURS]["seconds"]) * 1e3
                parts.append(f"One query: {p50:.2f} ms; reading its weights once takes {row['copy_limit_ms']:.2f} ms.")
    parts += ["Faults:", *(f"- {fault}" for fault in data["faults"])] if data["faults"] else ["No faults."]
    return "\n\n".join(parts)


def _shown(check: dict[str, Any]) -> list[str]:
    return [f"{check[key]:.1e}" if key in check else "" for key in ("distance", "allowed", "batch_difference")]


_GAP_HEADERS = ("ours, one call", "kernels", "span ms", "GPU busy", "gaps over 10 us", "longest gap us")

if __name__ == "__main__":
    sys.exit(1 if main()["faults"] else 0)
