"""Evaluate a checkpoint: `python -m training.evaluate [FOLDER] [--only colors]`.

Prints a table and writes training/results/default_model.json. All vectors are computed by `Embedder`. The row of the
colors needs only matplotlib; the other rows need the data of `python -m training.prepare`. Recall at k is the share of
queries with a correct result among the first k of the gallery. The vendor twemoji is never used for training; 15% of
the keywords are not used, or used only for half of their drawings.
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from embedder import Embedder
from training import data as pictures
from training.data import COLOR_NAMES, COLORS, Drawings, Size
from training.prepare import DEFAULT_DATA, HELD_OUT_STYLE

RESULTS = Path(__file__).parent / "results" / "default_model.json"
FULL_STYLES = ("noto", "fluent-emoji-flat")  # the trained styles that have (nearly) all drawings
SIZES: dict[str, Size] = {"64": (64, 64), "128": (128, 128), "224": (224, 224), "2:1": (128, 256)}
SMALL_DIMENSIONS = 64
CLIP_FRAMES = 4
MIN_QUERIES = 200  # for a loss at 64 dimensions: with 80 queries, a single one changes it by up to 3%


@dataclass(frozen=True)
class Row:
    """One row: `values`, with the minimum (`floors`) and the target (`aims`) of each; `at_most` inverts both."""

    what: str
    values: tuple[float, ...]
    floors: tuple[float, ...]
    aims: tuple[float, ...]
    at_most: bool = False

    def is_met(self, bars: tuple[float, ...]) -> bool:
        sign = -1 if self.at_most else 1
        return all(sign * value >= sign * bar for value, bar in zip(self.values, bars, strict=True))


@dataclass(frozen=True)
class Loss:
    """The relative loss of R@5 at 64 dimensions."""

    num_queries: int
    of_recall: float


class Meter:
    """Embeds with `Embedder` and shows a progress bar."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed(self, items: Sequence[Any], what: str) -> np.ndarray:
        """(num_items, hidden_size) unit vectors."""
        chunks = [items[start : start + 64] for start in range(0, len(items), 64)]
        return np.concatenate([self.embedder.embed(chunk) for chunk in tqdm(chunks, desc=what, leave=False)])


def recall(
    queries: np.ndarray, gallery: np.ndarray, right: np.ndarray, at: int, dimensions: int | None = None
) -> float:
    """Recall at `at`. `right`: (num_queries, num_gallery) bool. With `dimensions`, vectors are truncated."""
    cut = [vectors[:, :dimensions] for vectors in (queries, gallery)]
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in cut]
    first = np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")[:, :at]
    return float(np.take_along_axis(right, first, axis=1).any(axis=1).mean())


def recalls(
    queries: np.ndarray, gallery: np.ndarray, right: np.ndarray, dimensions: int | None = None
) -> tuple[float, float]:
    return recall(queries, gallery, right, 1, dimensions), recall(queries, gallery, right, 5, dimensions)


def loss_at_small(full: float, small: float) -> float:
    return max(0.0, 1 - small / full)


def color_rows(meter: Meter) -> tuple[list[Row], float]:
    """The row of the colors, and its relative loss of R@5 at 64 dimensions."""
    names = meter.embed(list(COLOR_NAMES), "color names")
    swatches = meter.embed([Image.fromarray(pictures.swatch(i, (64, 64))) for i in range(len(COLORS))], "swatches")
    right = (COLORS[:, None] == COLORS[None]).all(-1)
    values = recalls(names, swatches, right)
    small = recall(names, swatches, right, 5, SMALL_DIMENSIONS)
    row = Row("color name -> swatch, 949, R@1 / R@5", values, (0.65, 0.92), (0.90, 0.99))
    return [row], loss_at_small(values[1], small)


def drawing_rows(meter: Meter, data: Path) -> tuple[list[Row], dict[str, Loss], dict[str, Any]]:
    """The other rows, their losses at 64 dimensions, and more detailed figures."""
    captions = pictures.read_captions(data)
    names = meter.embed([caption["name"] for caption in captions], "names")
    styles = {style: pictures.read_drawings(data, style) for style in (*FULL_STYLES, HELD_OUT_STYLE)}
    galleries = {style: drawing_vectors(meter, style, drawings, SIZES["128"]) for style, drawings in styles.items()}
    by_style, losses = {}, dict[str, Loss]()
    for style, drawings in styles.items():
        rows = sorted(drawings.place)
        by_style[style] = recalls(names[rows], galleries[style], np.eye(len(rows), dtype=bool))
        small = recall(names[rows], galleries[style], np.eye(len(rows), dtype=bool), 5, SMALL_DIMENSIONS)
        losses[f"name -> {style}"] = Loss(len(rows), loss_at_small(by_style[style][1], small))
    trained = tuple(float(np.mean([by_style[style][place] for style in FULL_STYLES])) for place in (0, 1))
    by_keyword: dict[str, dict[str, float]] = {}
    for held_out, keywords in held_out_keywords(captions).items():
        words = meter.embed(sorted(keywords), f"keywords held out from {held_out}")
        by_keyword[held_out] = {}
        for style in ("noto", HELD_OUT_STYLE):
            rows = sorted(styles[style].place)
            right = np.array([[row in keywords[word] for row in rows] for word in sorted(keywords)])
            by_keyword[held_out][style] = recall(words, galleries[style], right, 5)
            small = recall(words, galleries[style], right, 5, SMALL_DIMENSIONS)
            loss = loss_at_small(by_keyword[held_out][style], small)
            losses[f"keyword held out from {held_out} -> {style}"] = Loss(len(words), loss)
    by_size = {}
    same = np.eye(len(captions), dtype=bool)
    for label, size in SIZES.items():
        vectors = galleries["noto"] if label == "128" else drawing_vectors(meter, f"noto {label}", styles["noto"], size)
        by_size[label] = recall(names, vectors, same, 5)
    clips = meter.embed([clip(styles["noto"], row) for row in range(len(captions))], "clips")
    to_vendor = recall(galleries["noto"], galleries[HELD_OUT_STYLE], same, 1)
    rows_of_table = [
        Row("name -> drawing, trained styles, R@1 / R@5", trained, (0.85, 0.97), (0.95, 0.995)),
        Row("name -> drawing, held-out vendor, R@1 / R@5", by_style[HELD_OUT_STYLE], (0.33, 0.58), (0.55, 0.80)),
        *(
            Row(
                f"keyword held out from {held_out} -> any correct drawing, trained / held-out vendor, R@5",
                tuple(values.values()),
                (0.92, 0.65),
                (0.97, 0.80),
            )
            for held_out, values in by_keyword.items()
        ),
        Row(
            "name -> drawing at 64, 128, 224 px and 2:1, worst R@5 / best",
            (min(by_size.values()) / max(by_size.values()),),
            (0.85,),
            (0.97,),
        ),
        Row("four-frame clip -> its name, R@5", (recall(clips, names, same, 5),), (0.60,), (0.95,)),
        Row("drawing -> drawing of the held-out vendor, R@1", (to_vendor,), (0.55,), (0.85,)),
    ]
    figures = {
        "by_style": by_style,
        "by_size": by_size,
        "drawings": len(captions),
    }
    return rows_of_table, losses, figures


def drawing_vectors(meter: Meter, what: str, drawings: Drawings, size: Size) -> np.ndarray:
    rows = sorted(drawings.place)
    return meter.embed([Image.fromarray(pictures.plain_picture(drawings, row, size)) for row in rows], what)


def clip(drawings: Drawings, row: int) -> dict[str, list[Image.Image]]:
    """Four frames of the drawing on white, moving right by two pixels per frame."""
    frame = pictures.plain_picture(drawings, row, (96, 96))
    shifted = [np.pad(frame, ((0, 0), (2 * n, 0), (0, 0)), constant_values=255)[:, :96] for n in range(CLIP_FRAMES)]
    return {"video": [Image.fromarray(np.ascontiguousarray(picture)) for picture in shifted]}


def held_out_keywords(captions: list[dict[str, Any]]) -> dict[str, dict[str, set[int]]]:
    """The keywords held out from half of their drawings, and from all of them, each with its drawings.

    Of the keywords held out from all drawings, only those whose words all occur in other training texts.
    """
    late = {word for caption in captions for word in caption["late_keywords"]}
    trained = {
        word
        for caption in captions
        for text in (caption["name"], *caption["keywords"], *caption["late_keywords"])
        for word in _words(text)
    }
    found: dict[str, dict[str, set[int]]] = {"half of its drawings": {}, "all drawings": {}}
    for row, caption in enumerate(captions):
        for keyword in (*caption["held_out_keywords"], *caption["late_keywords"]):
            if keyword in late:
                found["half of its drawings"].setdefault(keyword, set()).add(row)
            elif set(_words(keyword)) <= trained:
                found["all drawings"].setdefault(keyword, set()).add(row)
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def query_ms(embedder: Embedder) -> float:
    """The median time of one short text in milliseconds, over 200 calls."""
    seconds = []
    for index in range(200):
        start = time.perf_counter()
        embedder.embed([f"a red heart {index}"])
        seconds.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(seconds)), 2)


def print_table(rows: list[Row]) -> None:
    def percent(values: tuple[float, ...]) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in values)

    print(f"{'all in %':82} {'result':>12} {'minimum':>12} {'target':>12}")
    for row in rows:
        verdict = "minimum met" if row.is_met(row.floors) else "MINIMUM MISSED"
        verdict = "target met" if row.is_met(row.aims) else verdict
        print(f"{row.what:82} {percent(row.values):>12} {percent(row.floors):>12} {percent(row.aims):>12}  {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint of the bundled model.")
    parser.add_argument("folder", nargs="?", default="", help="default: the bundled model")
    parser.add_argument("--only", choices=("colors",), help="only the rows that need no download")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    start = time.monotonic()
    with Embedder(chosen.folder) as embedder:
        embedder.embed(["red"])
        first_vector_s = time.monotonic() - start
        figures: dict[str, Any] = {"first_vector_s": round(first_vector_s, 2), "query_ms": query_ms(embedder)}
        meter = Meter(embedder)
        rows, loss = color_rows(meter)
        losses = {"color name -> swatch": Loss(len(COLOR_NAMES), loss)}
        if chosen.only == "colors":
            pass
        elif not (chosen.data / "captions.json").exists():
            print("drawings and clips are not measured: their data is missing, run `python -m training.prepare`")
        else:
            more_rows, more_losses, more_figures = drawing_rows(meter, chosen.data)
            figures |= more_figures
            rows, losses = more_rows[:4] + rows + more_rows[4:], losses | more_losses
    rows.insert(
        5,
        Row(
            "rows with 200 queries or more at 64 of 192 dimensions, worst loss of R@5",
            (max(loss.of_recall for loss in losses.values() if loss.num_queries >= MIN_QUERIES),),
            (0.03,),
            (0.01,),
            True,
        ),
    )
    print_table(rows)
    print(f"first vector after {figures['first_vector_s']} s (limit 3); text query {figures['query_ms']} ms (limit 5)")
    result = {
        "rows": [{**asdict(row), "floor_met": row.is_met(row.floors), "aim_met": row.is_met(row.aims)} for row in rows],
        "losses_at_64": {name: asdict(loss) for name, loss in losses.items()},
        **figures,
        "machine": platform.processor() or platform.machine(),
        "seconds": round(time.monotonic() - start),
    }
    if chosen.only is None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
