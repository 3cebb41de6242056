"""Measure the effect of settings on the vectors: `python -m benchmarks.quality ablations`.

Measures recall and bytes by size and output type, recall by the query's instruction, bfloat16 compared with float32,
drift and speed by the maximum pixels of an image, and the influence of the other items in a batch. If the latter
exceeds rounding, the command exits with 1. Recall is that of color names on swatches and of names on drawings. Vectors
are computed by the library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from benchmarks import output_types, report
from benchmarks.drawings import drawing_sheet, drawings_of_the_demo
from benchmarks.output_types import recalls
from benchmarks.quality import neighbors
from benchmarks.quality.ablation_plot import plot
from benchmarks.quality.color_data import NAMES, equal_colors, swatch
from benchmarks.quality.targets import name_of
from embedder import Embedder
from embedder.inputs.prompt import QUERY_INSTRUCTION

RESULTS = report.RESULTS / "quality"
DEFAULT = "none (the service's default)"
INSTRUCTIONS = {"of the model card": QUERY_INSTRUCTION, "another": "Name what you see."}
REGIMES = {  # shares of the maximum pixels in the checkpoint's files
    "a quarter": 1 / 4,
    "half": 1 / 2,
    "the checkpoint's": 1.0,
    "the reference code's": 1_843_200 / 1_310_720,
}
USUAL = "the checkpoint's"
SHEET_CROP = 288  # pixels, three drawings wide; enlarged so that every setting shrinks it


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parse(arguments)
    model = f" --model {name_of({'model': chosen.model})}" if chosen.model else ""
    few = "" if chosen.count is None else f" --count {chosen.count}"
    about = report.environment(
        f"python -m benchmarks.quality ablations{model} --compositions {chosen.compositions}{few}"
    )
    with Embedder(chosen.model, dtype="float32") as embedder:
        info = embedder.info()
        whole = embed_all(embedder, chosen.count)
        names = {kind: pair[0] for kind, pair in whole.items()}
        by_instruction = {DEFAULT: names} | {
            label: embed_names(embedder, chosen.count, instruction) for label, instruction in INSTRUCTIONS.items()
        }
        found = neighbors.measure(embedder, chosen.compositions)
    with Embedder(chosen.model, dtype="bfloat16") as embedder:
        halves = embed_all(embedder, chosen.count)
    data = {
        "environment": about,
        "model": name_of(info),
        "device": info["device"],
        "types": output_types.measure(*whole["colors"]),
        "instructions": {label: _recalls(names, whole) for label, names in by_instruction.items()},
        "dtypes": compare_dtypes(whole, halves),
        "pixels": compare_pixels(chosen.model, info["pixels"]["max"], chosen.pictures),
        "neighbors": found,
    }
    text = describe(data)
    report.write(chosen.results, "ablations", data, text)
    plot(chosen.results / "ablations.png", data)
    print(text)
    return 0 if found["is_within"] else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality ablations", description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub id; default: the bundled model")
    parser.add_argument("--compositions", type=int, default=10_000, help="number of random batches")
    parser.add_argument("--count", type=int, help="use only the first COUNT colors and drawings")
    parser.add_argument("--pictures", type=int, default=16, help="images for the pixel settings")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


Pair = tuple[NDArray[np.float32], NDArray[np.float32]]  # names and pictures: (count, hidden_size) each


def embed_all(embedder: Embedder, count: int | None) -> dict[str, Pair]:
    """Embed colors and drawings with the default instruction."""
    names = embed_names(embedder, count, None)
    swatches = [swatch(index) for index in range(len(names["colors"]))]
    pictures = {"colors": swatches, "drawings": drawings_of_the_demo()[1][:count]}
    return {kind: (names[kind], output_types.embed(embedder, pictures[kind], kind)) for kind in pictures}


def embed_names(embedder: Embedder, count: int | None, instruction: str | None) -> dict[str, NDArray[np.float32]]:
    texts = {"colors": NAMES[:count], "drawings": drawings_of_the_demo()[0][:count]}
    return {
        kind: output_types.embed(
            embedder, [{"text": name, "instruction": instruction} for name in names], f"names of {kind}"
        )
        for kind, names in texts.items()
    }


def _recalls(names: dict[str, NDArray[np.float32]], whole: dict[str, Pair]) -> dict[str, tuple[float, float]]:
    """R@1 and R@5 of `names` on the images of `whole`."""
    return {kind: recalls(names[kind], whole[kind][1], right_pairs(kind, len(names[kind]))) for kind in names}


def right_pairs(kind: str, count: int) -> NDArray[np.bool_]:
    """The correct pairs of a name and a picture. If two names have the same color, both are correct."""
    return np.eye(count, dtype=bool) if kind == "drawings" else equal_colors(count)


def compare_dtypes(whole: dict[str, Pair], halves: dict[str, Pair]) -> dict[str, Any]:
    """The cosines between both dtypes over all names and images, and the recall of each dtype."""
    cosines = np.concatenate(
        [np.sum(one * other, axis=1) for kind in whole for one, other in zip(whole[kind], halves[kind], strict=True)]
    )
    recall = {
        dtype: {kind: recalls(*pair, right_pairs(kind, len(pair[0]))) for kind, pair in vectors.items()}
        for dtype, vectors in (("float32", whole), ("bfloat16", halves))
    }
    return {"least_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean()), "recall": recall}


def compare_pixels(model: str, max_pixels: int, num_pictures: int) -> list[dict[str, Any]]:
    """One row per setting: cosines to the checkpoint's setting, and images per second (one run after a warm-up)."""
    side = round((1.5 * max_pixels) ** 0.5)
    pictures = [crop.resize((side, side), PIL.Image.Resampling.BICUBIC) for crop in _crops(num_pictures)]
    vectors, rates = {}, {}
    for label, share in REGIMES.items():
        with Embedder(model, max_pixels=round(share * max_pixels)) as embedder:
            embedder.embed(pictures[:1])
            start = time.monotonic()
            vectors[label] = np.stack(embedder.embed(pictures))
            rates[label] = num_pictures / (time.monotonic() - start)
    cosines = {label: np.sum(rows * vectors[USUAL], axis=1) for label, rows in vectors.items()}
    return [
        {
            "regime": label,
            "max_pixels": round(REGIMES[label] * max_pixels),
            "mean_cosine": float(cosines[label].mean()),
            "least_cosine": float(cosines[label].min()),
            "pictures_per_s": rates[label],
        }
        for label in REGIMES
    ]


def _crops(count: int) -> list[PIL.Image.Image]:
    sheet = drawing_sheet()
    columns, rows = sheet.width // SHEET_CROP, sheet.height // SHEET_CROP
    corners = [(index % columns * SHEET_CROP, index // columns % rows * SHEET_CROP) for index in range(count)]
    return [sheet.crop((x, y, x + SHEET_CROP, y + SHEET_CROP)) for x, y in corners]


def describe(data: dict[str, Any]) -> str:
    """The report's Markdown."""
    dtypes = data["dtypes"]
    instructions = [[label, *_shown(row)] for label, row in data["instructions"].items()]
    by_dtype = [[dtype, *_shown(row)] for dtype, row in dtypes["recall"].items()]
    pixels = []
    for row in data["pixels"]:
        cosines = [f"{row[key]:.4f}" for key in ("mean_cosine", "least_cosine")]
        pixels.append([row["regime"], row["max_pixels"], *cosines, report.number(row["pictures_per_s"])])
    recall = ("colors: R@1 / R@5", "drawings: R@1 / R@5")
    return "\n\n".join(
        [
            f"Model: {data['model']}, on {data['device']}.\n\n![plot](ablations.png)",
            "## Output sizes and types (colors)",
            output_types.table(data["types"]),
            "## Instruction of the query",
            report.table(("instruction", *recall), instructions),
            "## dtype of the weights",
            report.table(("dtype", *recall), by_dtype),
            f"Cosine of bfloat16 to float32: {dtypes['mean_cosine']:.5f} on average, "
            f"{dtypes['least_cosine']:.5f} at the lowest.",
            "## Maximum pixels of an image",
            report.table(("setting", "pixels", "mean cosine", "lowest cosine", "images/s"), pixels),
            "Cosines to the vectors with the checkpoint's setting. The speed is from one run, so only the order of "
            "the settings is meaningful.",
            "## Other items in the batch",
            neighbors.text_of(data["neighbors"]),
        ]
    )


def _shown(row: dict[str, tuple[float, float]]) -> list[str]:
    return [f"{at_1:.3f} / {at_5:.3f}" for at_1, at_5 in (row["colors"], row["drawings"])]
