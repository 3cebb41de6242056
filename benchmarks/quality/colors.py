"""Compare services on 949 color names and their swatches: `python -m benchmarks.quality colors`.

`--url NAME=URL` adds a service with the default paths. `--models models.yaml` adds the services with `provider_type:
local` in that file; `--only` selects some of them. For each service, the command measures the cosine distance of a name
to its swatch, the rank of the swatch, and Spearman's correlation of embedding distance with CIEDE2000 over all pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks import report
from benchmarks.output_types import places
from benchmarks.quality.color_data import NAMES, color_differences, equal_colors, swatch
from benchmarks.quality.color_plot import plot
from benchmarks.quality.local_schema import Client, LocalService, read_models
from benchmarks.quality.mteb_model import png
from benchmarks.quality.targets import RequestFailed

RESULTS = report.RESULTS / "quality"
FIGURES = {
    "distance, mean": "distance_mean",
    "median": "distance_median",
    "std": "distance_std",
    "R@1": "recall_at_1",
    "R@5": "recall_at_5",
    "MRR": "mrr",
    "rho names-swatches": "spearman_names_swatches",
    "rho swatches": "spearman_swatches",
    "rho names": "spearman_names",
}
LEGEND = (
    "Distance: 1 - cosine of a name and its swatch. R@k: share of names whose swatch (or one of the same color) is "
    "among the first k. MRR: mean of 1 / rank. rho: Spearman's correlation of distance with CIEDE2000 over all pairs."
)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parse(arguments)
    about = report.environment(f"python -m benchmarks.quality colors --colors {chosen.colors} ..")
    measured: dict[str, dict[str, Any]] = {}
    pictures, failures = {}, {}
    for service in chosen.services:
        try:
            with Client(service) as client:
                vectors = embed(client, chosen.colors)
        except (httpx.TransportError, RequestFailed) as error:
            failures[service.name] = str(error)
        else:
            measured[service.name] = measure(*vectors)
            pictures[service.name] = vectors
    text = table(measured, chosen.colors, failures)
    data = {"environment": about, "num_colors": chosen.colors, "services": measured, "not_measured": failures}
    report.write(chosen.results, "colors", data, text)
    plot(chosen.results / "colors.png", pictures)
    print(text)
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality colors", description=__doc__)
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="can be repeated")
    parser.add_argument("--models", type=Path, help="a models.yaml with services of `provider_type: local`")
    parser.add_argument("--only", nargs="+", help="names of its services to use; default: all local ones")
    parser.add_argument("--colors", type=int, default=len(NAMES), help="use only the first COLORS colors")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    services = read_models(chosen.models) if chosen.models else []
    chosen.services = [one for one in services if chosen.only is None or one.name in chosen.only]
    for given in chosen.url:
        name, is_named, url = given.partition("=")
        if not is_named:
            parser.error(f"--url: got {given!r}; expected NAME=URL")
        chosen.services.append(LocalService(name, url))
    if not chosen.services:
        parser.error("no services: give --url, or --models with a provider of type local")
    return chosen


def embed(client: Client, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors of the first `count` names and their swatches, (count, dimensions) each."""
    names = client.embed_texts(NAMES[:count])
    swatches = client.embed_images([png(swatch(index)) for index in range(count)])
    return unit(names), unit(swatches)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(names: NDArray[np.float32], swatches: NDArray[np.float32]) -> dict[str, Any]:
    """All figures of one service."""
    count = len(names)
    own = 1 - np.sum(names * swatches, axis=1)
    at = places(names, swatches, equal_colors(count))
    differences = color_differences(count)
    pairs = np.triu_indices(count, 1)
    return {
        "dimensions": names.shape[1],
        "distance_mean": float(own.mean()),
        "distance_median": float(np.median(own)),
        "distance_std": float(own.std()),
        "recall_at_1": float((at < 1).mean()),
        "recall_at_5": float((at < 5).mean()),
        "mrr": float((1 / (1 + at)).mean()),
        "spearman_names_swatches": correlation(names @ swatches.T, differences),
        "spearman_swatches": correlation((swatches @ swatches.T)[pairs], differences[pairs]),
        "spearman_names": correlation((names @ names.T)[pairs], differences[pairs]),
    }


def correlation(similarities: NDArray[np.float32], differences: NDArray[np.float64]) -> float:
    """Spearman's rho of 1 - similarity and the color differences."""
    return float(spearmanr(1 - similarities.ravel(), differences.ravel()).statistic)


def table(measured: dict[str, dict[str, Any]], count: int, failures: dict[str, str]) -> str:
    rows = [
        [name, figures["dimensions"], *(f"{figures[key]:.3f}" for key in FIGURES.values())]
        for name, figures in measured.items()
    ]
    parts = [f"{count} colors. {LEGEND}", report.table(("service", "dimensions", *FIGURES), rows)]
    parts += ["![names and swatches](colors.png)"] if measured else []
    parts += [f"NOT MEASURED: {name}: {reason}" for name, reason in failures.items()]
    return "\n\n".join(parts)
