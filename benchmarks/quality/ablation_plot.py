"""The figures of `ablations` -> one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quality.neighbors import ALLOWED


def plot(path: Path, data: dict[str, Any]) -> None:
    """Recall over bytes, drift over pixels, and how far neighbors reach."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (recall, drift, reach) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for dtype in ("float32", "float16", "int8", "binary"):  # the unsigned ones are the same
        rows = [row for row in data["types"] if row["output_dtype"] == dtype]
        recall.plot([row["bytes"] for row in rows], [row["recall_at_1"] for row in rows], marker="o", label=dtype)
    recall.set(xscale="log", xlabel="bytes of a vector", ylabel="R@1, color name to swatch")
    recall.legend()
    rows = data["pixels"]
    drift.plot([row["max_pixels"] for row in rows], [row["mean_cosine"] for row in rows], marker="o", label="mean")
    drift.plot([row["max_pixels"] for row in rows], [row["least_cosine"] for row in rows], marker="o", label="least")
    drift.set(xlabel="pixels that a picture keeps", ylabel="cosine to the checkpoint's regime")
    drift.legend()
    quantiles = data["neighbors"]["quantiles"]
    reach.bar(list(quantiles), list(quantiles.values()))
    reach.axhline(ALLOWED, color="black", linewidth=0.8)
    reach.set(
        yscale="log",
        xlabel="share of compositions",
        ylabel="largest difference from the item alone",
        title=f"{data['neighbors']['num_compositions']} random batches; the line is what is allowed",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
