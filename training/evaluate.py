"""A checkpoint folder -> the table of what it finds, printed and as JSON in training/results/.

`python -m training.evaluate [FOLDER] [--only colors]`. Everything runs through the product's own path, `Embedder`. The
colors need nothing but matplotlib; the other rows need the data of `python -m training.prepare`. The vendor twemoji
was never trained on; 15 % of the keywords were not, or for half of their drawings only. Recall at k: the share of
queries with a right answer among the first k of the whole gallery.
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
FULL_STYLES = ("noto", "fluent-emoji-flat")  # the trained styles that draw (nearly) everything
SIZES: dict[str, Size] = {"64": (64, 64), "128": (128, 128), "224": (224, 224), "2:1": (128, 256)}
SMALL_DIMENSIONS = 64
CLIP_FRAMES = 4
MIN_QUERIES = 200  # for a loss at fewer dimensions to count: of 80 one more or less is a loss of 3 %


@dataclass(frozen=True)
class Row:
    """One line of the table: `values` against `floors` and `aims` in the same order; `at_most` turns that round."""

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
    """Of R@5 where vectors are cut, relative."""

    num_queries: int
    of_recall: float


class Meter:
    """Embeds through the product, with a progress bar."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed(self, items: Sequence[Any], what: str) -> np.ndarray:
        """(num_items, hidden_size) unit vectors."""
        chunks = [items[start : start + 64] for start in range(0, len(items), 64)]
        return np.concatenate([self.embedder.embed(chunk) for chunk in tqdm(chunks, desc=what, leave=False)])


def recall(
    queries: np.ndarray, gallery: np.ndarray, right: np.ndarray, at: int, dimensions: int | None = None
) -> float:
    """`right` (num_queries, num_gallery) bool. With `dimensions`, vectors are cut and made unit length again."""
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
    """The row of the colors, and its loss of R@5 at 64 dimensions."""
    names = meter.embed(list(COLOR_NAMES), "color names")
    swatches = meter.embed([Image.fromarray(pictures.swatch(i, (64, 64))) for i in range(len(COLORS))], "swatches")
    right = (COLORS[:, None] == COLORS[None]).all(-1)
    values = recalls(names, swatches, right)
    small = recall(names, swatches, right, 5, SMALL_DIMENSIONS)
    row = Row("color name -> swatch, 949, R@1 / R@5", values, (0.65, 0.92), (0.90, 0.99))
    return [row], loss_at_small(values[1], small)


def drawing_rows(meter: Meter, data: Path) -> tuple[list[Row], dict[str, Loss], dict[str, Any]]:
    """All other rows, their losses at 64 dimensions, and the figures behind them."""
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
                f"keyword held out from {held_out} -> any right drawing, trained / held-out vendor, R@5",
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
    """Four frames of the drawing on white, moving to the right by two pixels a frame."""
    frame = pictures.plain_picture(drawings, row, (96, 96))
    shifted = [np.pad(frame, ((0, 0), (2 * n, 0), (0, 0)), constant_values=255)[:, :96] for n in range(CLIP_FRAMES)]
    return {"video": [Image.fromarray(np.ascontiguousarray(picture)) for picture in shifted]}


def held_out_keywords(captions: list[dict[str, Any]]) -> dict[str, dict[str, set[int]]]:
    """Keywords that training held out from half of their drawings or from all of them -> the drawings that have them.

    Of those held out from all, the ones whose every word stands in some other text that was trained on.
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
    """Milliseconds of one short text, alone: the median of 200."""
    seconds = []
    for index in range(200):
        start = time.perf_counter()
        embedder.embed([f"a red heart {index}"])
        seconds.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(seconds)), 2)


def print_table(rows: list[Row]) -> None:
    def percent(values: tuple[float, ...]) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in values)

    print(f"{'all in %':82} {'reached':>12} {'floor':>12} {'aim':>12}")
    for row in rows:
        verdict = "aim met" if row.is_met(row.aims) else "floor met" if row.is_met(row.floors) else "FLOOR MISSED"
        print(f"{row.what:82} {percent(row.values):>12} {percent(row.floors):>12} {percent(row.aims):>12}  {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint of the embedded default model.")
    parser.add_argument("folder", nargs="?", default="", help="the package's own model if not given")
    parser.add_argument("--only", choices=("colors",), help="what needs no downloads")
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
            print("drawings and clips: not measured, their data is not prepared (python -m training.prepare)")
        else:
            more_rows, more_losses, more_figures = drawing_rows(meter, chosen.data)
            figures |= more_figures
            rows, losses = more_rows[:4] + rows + more_rows[4:], losses | more_losses
    rows.insert(
        5,
        Row(
            "the rows of 200 queries and more at 64 of 192 dimensions, worst loss of R@5",
            (max(loss.of_recall for loss in losses.values() if loss.num_queries >= MIN_QUERIES),),
            (0.03,),
            (0.01,),
            True,
        ),
    )
    print_table(rows)
    print(f"to the first vector {figures['first_vector_s']} s, of 3; a text query {figures['query_ms']} ms, of 5")
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
