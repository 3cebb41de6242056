"""Recall of color names and swatches for each output type and size: `python -m benchmarks.output_types [MODEL]`.

Embeds matplotlib's 949 xkcd names and a swatch of each with the bundled model (or MODEL), quantizes them as the service
does, writes benchmarks/results/output_types.json and prints a Markdown table. Queries and gallery have the same type:
integers and bits are compared as they are stored.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.quality.color_data import COLORS, NAMES, equal_colors, swatch
from embedder import Embedder
from embedder.engine.postprocess import OutputDtype, dequantize, finish_vectors, quantize

RESULTS = Path(__file__).parent / "results" / "output_types.json"
DIMENSIONS = (64, 128, 256, 512, 1024, 2048)
CHUNK = 64


def embed(embedder: Embedder, items: list[Any], what: str) -> NDArray[np.float32]:
    """(num_items, hidden_size) unit vectors."""
    rows = []
    with tqdm(total=len(items), desc=what, unit="item") as bar:
        for start in range(0, len(items), CHUNK):
            rows += embedder.embed(items[start : start + CHUNK])
            bar.update(len(items[start : start + CHUNK]))
    return np.stack(rows)


def as_stored(vectors: NDArray[np.float32], dimensions: int, output_dtype: OutputDtype) -> NDArray[np.float32]:
    """The vectors that a client compares: truncated, normalized, quantized and dequantized."""
    cut = np.stack(finish_vectors(vectors, [(dimensions, True)] * len(vectors)))
    back = dequantize(quantize(cut, output_dtype), output_dtype, dimensions)
    return back / np.linalg.norm(back, axis=1, keepdims=True)


def num_bytes(dimensions: int, output_dtype: OutputDtype) -> int:
    """The size of one vector in bytes."""
    return quantize(np.zeros(dimensions, np.float32), output_dtype).nbytes


def places(queries: NDArray[np.float32], gallery: NDArray[np.float32], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The number of results before each query's first correct one, (num_queries,).

    Of results with an equal score (frequent with binary vectors), half count as before.
    """
    scores = queries.astype(np.float64) @ gallery.T.astype(np.float64)
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    better = (scores > best + 1e-12).sum(1)
    tied = (np.abs(scores - best) <= 1e-12).sum(1) - 1
    return np.asarray(better + tied / 2)


def recalls(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], right: NDArray[np.bool_]
) -> tuple[float, float]:
    """R@1 and R@5."""
    at = places(queries, gallery, right)
    return float((at < 1).mean()), float((at < 5).mean())


def measure(names: NDArray[np.float32], swatches: NDArray[np.float32]) -> list[dict[str, Any]]:
    """One row per type and size. If two names have the same color, both are correct."""
    right = equal_colors(len(names))
    full = names.shape[1]
    rows = []
    for output_dtype in get_args(OutputDtype):
        for dimensions in [*(size for size in DIMENSIONS if size < full), full]:
            at_1, at_5 = recalls(*(as_stored(one, dimensions, output_dtype) for one in (names, swatches)), right)
            rows.append(
                {
                    "output_dtype": output_dtype,
                    "dimensions": dimensions,
                    "bytes": num_bytes(dimensions, output_dtype),
                    "recall_at_1": round(at_1, 4),
                    "recall_at_5": round(at_5, 4),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One row per type, one column per size. Signed and unsigned types are equal and share a row."""
    sizes = sorted({row["dimensions"] for row in rows})
    head = [f"{size} dimensions: R@1 / R@5 (bytes)" for size in sizes]
    lines = ["| " + " | ".join(["output_dtype", *head]) + " |", "|---" * (len(sizes) + 1) + "|"]
    cells: dict[str, list[str]] = {}
    for output_dtype in get_args(OutputDtype):
        own = {row["dimensions"]: row for row in rows if row["output_dtype"] == output_dtype}
        cells[output_dtype] = [
            f"{own[size]['recall_at_1']:.3f} / {own[size]['recall_at_5']:.3f} ({own[size]['bytes']})" for size in sizes
        ]
    for one, other in (("float32",) * 2, ("float16",) * 2, ("int8", "uint8"), ("binary", "ubinary")):
        assert cells[one] == cells[other]
        label = f"`{one}`" if one == other else f"`{one}`, `{other}`"
        lines.append("| " + " | ".join([label, *cells[one]]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.monotonic()
    with Embedder(arguments.model) as embedder:
        names = embed(embedder, NAMES, "color names")
        swatches = embed(embedder, [swatch(index) for index in range(len(COLORS))], "swatches")
        info = embedder.info()
    rows = measure(names, swatches)
    result = {
        "model": info["model"],
        "revision": info["revision"],
        "device": info["device"],
        "dtype": info["dtype"],
        "machine": platform.machine(),
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
