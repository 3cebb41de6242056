"""Plot the results of `ablations`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quality.neighbors import ALLOWED


def plot(path: Path, data: dict[str, Any]) -> None:
    """Plot recall over bytes, drift over pixels, and the influence of the batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (recall, drift, reach) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for dtype in ("float32", "float16", "int8", "binary"):  # unsigned types have the same recall
        rows = [row for row in data["types"] if row["output_dtype"] == dtype]
        recall.plot([row["bytes"] for row in rows], [row["recall_at_1"] for row in rows], marker="o", label=dtype)
    recall.set(xscale="log", xlabel="bytes of a vector", ylabel="R@1, color name to swatch")
    recall.legend()
    rows = data["pixels"]
    drift.plot([row["max_pixels"] for row in rows], [row["mean_cosine"] for row in rows], marker="o", label="mean")
    drift.plot([row["max_pixels"] for row in rows], [row["least_cosine"] for row in rows], marker="o", label="least")
    drift.set(xlabel="maximum pixels of an image", ylabel="cosine to the checkpoint's setting")
    drift.legend()
    quantiles = data["neighbors"]["quantiles"]
    reach.bar(list(quantiles), list(quantiles.values()))
    reach.axhline(ALLOWED, color="black", linewidth=0.8)
    reach.set(
        yscale="log",
        xlabel="share of compositions",
        ylabel="largest difference from the single item",
        title=f"{data['neighbors']['num_compositions']} random batches; the line is the limit",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
