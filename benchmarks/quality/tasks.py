"""mteb tasks that need no hub: colors and the demo's drawings, as texts, images, and both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.ImageOps
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from benchmarks.drawings import drawings_of_the_demo
from benchmarks.quality.color_data import NAMES, color_differences, equal_colors, swatch
from embedder import __version__

ALIKE = 5.0  # CIEDE2000; below it, two colors differ visibly but look similar
Columns = Mapping[str, Sequence[Any]]  # `text`, `image` or both, one value per entry


class LocalRetrieval(AbsTaskRetrieval):
    """A retrieval task. `relevant`: (num_queries, num_documents) bool.

    mteb identifies results by the task's name, so the name contains `count` if only the first entries are used.
    """

    def __init__(
        self, name: str, category: str, queries: Columns, corpus: Columns, relevant: Any, prompt: str, count: int | None
    ) -> None:
        name = name if count is None else f"{name}-{count}"
        self.metadata = TaskMetadata(
            name=name,
            description=f"{name}, from data in the package",
            dataset={"path": "local", "revision": __version__},
            type="Retrieval" if category == "t2t" else "Any2AnyRetrieval",
            category=category,
            modalities=["text"] if category == "t2t" else ["text", "image"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            prompt={"query": prompt},
        )
        super().__init__()
        split = {
            "queries": Dataset.from_dict({"id": _ids("q", queries), **queries}),
            "corpus": Dataset.from_dict({"id": _ids("d", corpus), **corpus}),
            "relevant_docs": {
                f"q{row}": {f"d{column}": 1 for column in np.flatnonzero(found)} for row, found in enumerate(relevant)
            },
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def _ids(letter: str, columns: Columns) -> list[str]:
    return [f"{letter}{number}" for number in range(len(next(iter(columns.values()))))]


def similar_colors(count: int | None) -> LocalRetrieval:
    """Retrieve names of similar colors with a color's name, without the name itself. Texts only."""
    names = NAMES[:count]
    alike = (color_differences(len(names)) <= ALIKE) & ~np.eye(len(names), dtype=bool)
    asked = np.flatnonzero(alike.any(axis=1))
    queries = {"text": [f"a color like {names[index]}" for index in asked]}
    prompt = "Find colors that look alike."
    return LocalRetrieval("SimilarColors", "t2t", queries, {"text": names}, alike[asked], prompt, count)


def swatches(count: int | None) -> LocalRetrieval:
    """Retrieve a swatch with the color's name."""
    same = equal_colors(len(NAMES[:count]))
    pictures = {"image": [swatch(index) for index in range(len(same))]}
    return LocalRetrieval("Swatches", "t2i", {"text": NAMES[:count]}, pictures, same, "Find the color.", count)


def drawings(count: int | None) -> LocalRetrieval:
    """Retrieve a drawing with its name."""
    names, pictures = drawings_of_the_demo()
    same = np.eye(len(names[:count]), dtype=bool)
    gallery = {"image": pictures[:count]}
    return LocalRetrieval("Drawings", "t2i", {"text": names[:count]}, gallery, same, "Find the drawing.", count)


def mixtures(count: int | None) -> LocalRetrieval:
    """Retrieve a drawing with its name, using the mirrored drawing: images, and images with texts."""
    names, pictures = drawings_of_the_demo()
    mirrored = [PIL.ImageOps.mirror(picture) for picture in pictures[:count]]
    documents = {"text": names[:count], "image": pictures[:count]}
    same = np.eye(len(mirrored), dtype=bool)
    prompt = "Find the same drawing."
    return LocalRetrieval("MirroredDrawings", "i2it", {"image": mirrored}, documents, same, prompt, count)


LOCAL_TASKS = {
    "SimilarColors": similar_colors,
    "Swatches": swatches,
    "Drawings": drawings,
    "MirroredDrawings": mixtures,
}
