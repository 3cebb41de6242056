"""Measure how far a vector depends on anything but its content: `python -m benchmarks.invariance [MODEL]`.

Texts, pictures, a mixture and a clip are embedded one by one. The vectors are compared with those of the same items in
random batches, without the cached keys and values of their instruction, in a new process, and in two processes that
compute at the same time as two workers of a service do. Exit status: 0 every difference is within its bound, 1 not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from benchmarks import report
from embedder import Embedder
from embedder.inputs.items import item_from_fields
from embedder.inputs.prompt import QUERY_INSTRUCTION

Vectors = NDArray[np.float32]
Rows = dict[str, dict[str, dict[str, float]]]  # of dtype and case

# The promise. In bfloat16 a different order of additions changes the last of 8 bits, in every layer.
MAX_DIFFERENCE = {"float32": 1e-6, "bfloat16": 0.02}
MIN_COSINE = {"float32": 0.999999, "bfloat16": 0.999}
CASES = ("again", "in a batch", "without cached instruction", "after a restart", "in two workers")


def picture(width: int, height: int, seed: int) -> PIL.Image.Image:
    """Smooth random colors."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BILINEAR)


def items() -> list[dict[str, Any]]:
    """One word to 300 words, with and without an instruction of their own, pictures, a mixture and a clip."""
    return [
        *({"text": "red green blue " * count} for count in (1, 7, 100)),
        *({"text": text, "instruction": QUERY_INSTRUCTION} for text in ("red", "a bee on a flower")),
        *({"image": picture(*size, seed)} for seed, size in enumerate([(64, 64), (333, 120), (200, 224)])),
        {"image": picture(100, 200, 4), "text": "what the picture shows"},
        {"video": [picture(96, 64, seed) for seed in range(5)]},
    ]


def measure(model: str, device: str, dtypes: Sequence[str], num_batches: int) -> Rows:
    """For each dtype and case the largest difference of a value and the lowest cosine."""
    (first,) = _in_processes(1, vectors_of_one_process, (model, device, dtypes, num_batches))
    restarted = _in_processes(1, _embed_alone, (model, device, dtypes, 1))
    workers = _in_processes(2, _embed_alone, (model, device, dtypes, 2))
    rows: Rows = {}
    for dtype in dtypes:
        found = {**first[dtype], "after a restart": [one[dtype] for one in restarted]}
        found["in two workers"] = [one[dtype] for one in workers]
        rows[dtype] = {case: differences(found["alone"][0], found[case]) for case in CASES}
    return rows


def _in_processes(count: int, function: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """The results of `function` in so many new processes at the same time."""
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        return [one.result() for one in [pool.submit(function, *arguments) for _ in range(count)]]


def differences(alone: Vectors, others: Sequence[Vectors]) -> dict[str, float]:
    return {
        "difference": max(float(np.abs(other - alone).max()) for other in others),
        "cosine": min(float((other.astype(np.float64) * alone).sum(1).min()) for other in others),
    }


def _embed_alone(model: str, device: str, dtypes: Sequence[Any], workers: int) -> dict[str, Vectors]:
    vectors = {}
    for dtype in dtypes:
        with Embedder("" if model == "bundled" else model, device=device, dtype=dtype, workers=workers) as embedder:
            vectors[dtype] = np.stack([embedder.embed([item])[0] for item in items()])
    return vectors


def vectors_of_one_process(
    model: str, device: str, dtypes: Sequence[Any], num_batches: int
) -> dict[str, dict[str, list[Vectors]]]:
    """For each dtype the vectors of the items by themselves (`alone`), and of each case that needs one process."""
    vectors = {}
    for dtype in dtypes:
        with Embedder("" if model == "bundled" else model, device=device, dtype=dtype) as embedder:
            vectors[dtype] = _cases(embedder, num_batches)
    return vectors


def _cases(embedder: Embedder, num_batches: int) -> dict[str, list[Vectors]]:
    everything = items()
    alone, again = (np.stack([embedder.embed([item])[0] for item in everything]) for _ in range(2))
    random = np.random.default_rng(0)
    batches = []
    for _ in range(num_batches):
        order = random.permutation(np.repeat(np.arange(len(everything)), 2))
        rows = dict(zip(order.tolist(), embedder.embed([everything[index] for index in order]), strict=True))
        batches.append(np.stack([rows[index] for index in range(len(everything))]))
    loaded = embedder.models.embedder
    assert loaded is not None
    inputs = [embedder.preprocessor(item_from_fields(item)) for item in everything]
    assert all(one.num_prefix_tokens for one in inputs)  # or there is nothing to compare
    states = np.concatenate([loaded.launch([one.without_prefix()])() for one in inputs])
    plain = states / np.linalg.norm(states, axis=1, keepdims=True)
    return {"alone": [alone], "again": [again], "in a batch": batches, "without cached instruction": [plain]}


def is_within(dtype: str, found: dict[str, float]) -> bool:
    """Whether a case keeps the promise."""
    return found["difference"] <= MAX_DIFFERENCE[dtype] and found["cosine"] >= MIN_COSINE[dtype]


def table(rows: Rows) -> str:
    """One line for each case, with the bounds in the last one."""
    dtypes = list(rows)
    cells = [
        [case, *(f"{rows[dtype][case]['difference']:.1e}, {rows[dtype][case]['cosine']:.7f}" for dtype in dtypes)]
        for case in CASES
    ]
    promise = ["promised", *(f"at most {MAX_DIFFERENCE[dtype]}, at least {MIN_COSINE[dtype]}" for dtype in dtypes)]
    return report.table(["the same item", *(f"{one}: difference, cosine" for one in dtypes)], [*cells, promise])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it to the results. Returns the exit status."""
    parser = argparse.ArgumentParser(description="How far a vector depends on anything but its content.")
    parser.add_argument("model", nargs="?", default="bundled", help="checkpoint folder, hub id or `bundled`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", choices=list(MAX_DIFFERENCE), default=list(MAX_DIFFERENCE))
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    rows = measure(chosen.model, chosen.device, chosen.dtypes, chosen.batches)
    command = f"python -m benchmarks.invariance {Path(chosen.model).name} --device {chosen.device}"
    text = table(rows)
    report.write(chosen.results, "invariance", {"environment": report.environment(command), "rows": rows}, text)
    print(text)
    return int(not all(is_within(dtype, found) for dtype, cases in rows.items() for found in cases.values()))


if __name__ == "__main__":
    sys.exit(main())
