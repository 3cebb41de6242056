"""Evaluate the bundled reranker: `python -m training.evaluate_reranker [FOLDER]`.

The bundled embedder finds the 20 best drawings for each name or keyword, and the reranker ranks these again. Prints
recall at 1 before and after, and writes training/results/default_reranker.json. Everything is computed by `Embedder`
and `Reranker`, in float32. Needs the data of `python -m training.prepare`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from embedder import Embedder, Reranker
from training import data as pictures
from training.evaluate import SIZES, Meter, drawing_vectors, held_out_keywords
from training.prepare import DEFAULT_DATA, HELD_OUT_STYLE
from training.train_reranker import OUT

RESULTS = Path(__file__).parent / "results" / "default_reranker.json"
CANDIDATES = 20
STYLES = ("noto", HELD_OUT_STYLE)
MIN_GAIN = {HELD_OUT_STYLE: 0.05, "noto": 0.0}  # of recall at 1 for names


@dataclass(frozen=True)
class Row:
    """Recall at 1 before and after reranking, and the share of queries with a correct candidate, which limits it."""

    what: str
    num_queries: int
    before: float
    after: float
    limit: float
    min_gain: float | None

    @property
    def is_met(self) -> bool:
        return self.min_gain is None or self.after - self.before >= self.min_gain


class Evaluation:
    def __init__(self, embedder: Embedder, reranker: Reranker, data: Path) -> None:
        self.meter = Meter(embedder)
        self.reranker = reranker
        self.captions = pictures.read_captions(data)
        self.num_pairs = 0
        self.seconds = 0.0
        self.positives: list[float] = []
        self.negatives: list[float] = []

    def rows(self, data: Path) -> list[Row]:
        rows = []
        for style in STYLES:
            drawings = pictures.read_drawings(data, style)
            places = sorted(drawings.place)
            gallery = drawing_vectors(self.meter, style, drawings, SIZES["128"])
            images = [Image.fromarray(pictures.plain_picture(drawings, row, SIZES["128"])) for row in places]
            names = [self.captions[row]["name"] for row in places]
            same = np.eye(len(places), dtype=bool)
            rows.append(self.row(f"name -> {style}", names, gallery, images, same, MIN_GAIN[style]))
            for held_out, keywords in held_out_keywords(self.captions).items():
                words = sorted(keywords)
                right = np.array([[row in keywords[word] for row in places] for word in words])
                rows.append(self.row(f"keyword held out from {held_out} -> {style}", words, gallery, images, right))
        return rows

    def row(
        self,
        what: str,
        texts: Sequence[str],
        gallery: np.ndarray,
        images: list[Image.Image],
        right: np.ndarray,
        min_gain: float | None = None,
    ) -> Row:
        """`right`: (num_texts, num_images) bool."""
        similarities = self.meter.embed(texts, what) @ gallery.T
        first = np.argsort(-similarities, axis=1, kind="stable")[:, :CANDIDATES]
        found = np.take_along_axis(right, first, axis=1)  # (num_texts, CANDIDATES)
        best = []
        asked = tqdm(texts, desc=f"rerank {what}", leave=False)
        for text, candidates, correct in zip(asked, first, found, strict=True):
            start = time.perf_counter()
            scores = self.reranker.score(text, [{"image": images[place]} for place in candidates])
            self.seconds += time.perf_counter() - start
            self.num_pairs += len(scores)
            best.append(bool(correct[int(np.argmax(scores))]))
            self.positives += [score for score, is_right in zip(scores, correct, strict=True) if is_right]
            self.negatives += [score for score, is_right in zip(scores, correct, strict=True) if not is_right]
        before, limit = float(found[:, 0].mean()), float(found.any(1).mean())
        return Row(what, len(texts), before, float(np.mean(best)), limit, min_gain)


def print_table(rows: list[Row]) -> None:
    print(f"{'recall at 1 in %':58} {'queries':>8} {'before':>7} {'after':>7} {'gain':>6} {'limit':>6} {'needed':>7}")
    for row in rows:
        needed = "" if row.min_gain is None else f"{100 * row.min_gain:+.1f}"
        verdict = "" if row.min_gain is None else "met" if row.is_met else "MISSED"
        values = f"{100 * row.before:7.1f} {100 * row.after:7.1f} {100 * (row.after - row.before):+6.1f}"
        print(f"{row.what:58} {row.num_queries:8} {values} {100 * row.limit:6.1f} {needed:>7} {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint of the bundled reranker.")
    parser.add_argument("folder", nargs="?", default=str(OUT), help="default: the bundled reranker")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if not (chosen.data / "captions.json").exists():
        raise SystemExit("the data is missing; run `python -m training.prepare`")
    with Embedder(dtype="float32") as embedder, Reranker(chosen.folder, dtype="float32") as reranker:
        evaluation = Evaluation(embedder, reranker, chosen.data)
        rows = evaluation.rows(chosen.data)
    print_table(rows)
    above = {
        "correct pairs with a score above 0.5": float(np.mean(np.array(evaluation.positives) > 0.5)),
        "other candidates with a score above 0.5": float(np.mean(np.array(evaluation.negatives) > 0.5)),
    }
    for what, share in above.items():
        print(f"{what}: {100 * share:.1f} %")
    print(f"{evaluation.num_pairs} pairs, {evaluation.num_pairs / evaluation.seconds:.0f} a second")
    result = {
        "rows": [{**asdict(row), "is_met": row.is_met} for row in rows],
        "candidates": CANDIDATES,
        "shares": above,
        "pairs_per_s": round(evaluation.num_pairs / evaluation.seconds),
    }
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not all(row.is_met for row in rows))


if __name__ == "__main__":
    main()
