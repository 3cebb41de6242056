"""Plot the vectors of color names and swatches, and the retrieved colors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.color_data import COLORS

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]  # names, swatches: (num_colors, dimensions) unit vectors


def plot(path: Path, services: dict[str, Pair]) -> None:
    """Plot one row per service. Writes no file without services."""
    if not services:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(services), 2, figsize=(13, 6.5 * len(services)), squeeze=False, layout="constrained"
    )
    for (name, pair), (left, right) in zip(services.items(), axes, strict=True):
        _map(left, *pair)
        left.set_title(f"{name}: swatches (dots) and names (crosses), each name with a line to its swatch", fontsize=9)
        _found(right, *pair)
        right.set_title(f"{name}: each color, with the first result for its name inside", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _map(axes: Any, names: NDArray[np.float32], swatches: NDArray[np.float32]) -> None:
    """The first two principal components of the swatches. Names are centered separately, because modalities differ."""
    _, _, directions = np.linalg.svd(swatches - swatches.mean(axis=0), full_matrices=False)
    points = [(vectors - vectors.mean(axis=0)) @ directions[:2].T for vectors in (names, swatches)]
    colors = COLORS[: len(names)] / 255
    axes.plot(*np.stack(points).transpose(2, 0, 1), color="0.85", linewidth=0.4, zorder=1)
    axes.scatter(*points[1].T, c=colors, s=28, edgecolors="0.5", linewidths=0.2, zorder=2)
    axes.scatter(*points[0].T, c=colors, s=14, marker="x", linewidths=0.8, zorder=3)
    axes.set_xticks([])
    axes.set_yticks([])


def _found(axes: Any, names: NDArray[np.float32], swatches: NDArray[np.float32]) -> None:
    """One tile per color, with the first result's color as a smaller tile inside."""
    first = COLORS[(names @ swatches.T).argmax(axis=1)]
    columns = math.ceil(math.sqrt(len(names)))
    tiles = np.full((columns * columns, 6, 6, 3), 255, np.uint8)
    tiles[: len(names)] = COLORS[: len(names), None, None]
    tiles[: len(names), 2:5, 2:5] = first[:, None, None]
    axes.imshow(tiles.reshape(columns, columns, 6, 6, 3).transpose(0, 2, 1, 3, 4).reshape(columns * 6, columns * 6, 3))
    axes.axis("off")
