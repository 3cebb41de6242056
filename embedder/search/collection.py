"""An output of `embedder.bulk` -> the rows whose vectors are nearest to a query.

Every vector is compared: a single search reads all of them from the disk anyway, so an index or smaller vectors would
save nothing. Rows are read in batches, and only the best are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.dataset
from numpy.typing import NDArray

from embedder.bulk.source import split_page
from embedder.bulk.writer import STATE_FOLDER
from embedder.engine.postprocess import OutputDtype, dequantize


@dataclass(frozen=True)
class Hit:
    """A row that was found. `page`: 0 of a file without pages. `text`: the page's text layer, if it has one."""

    id: str
    file: str
    page: int
    score: float
    text: str


class Collection:
    """A finished output. Raises `ValueError` if the folder is none.

    `model`: name and revision of the checkpoint. `dimensions`: of the vectors; None: the model's. `folder`: the input.
    """

    def __init__(self, output: Path) -> None:
        state = output / STATE_FOLDER / "job.json"
        if not state.is_file():
            raise ValueError(f"{output} is no output of embedder.bulk: it has no {STATE_FOLDER}/job.json")
        job = json.loads(state.read_text())
        self.model, self.dimensions = str(job["model"]), job["dimensions"]
        self.default_instruction, self.output_dtype = (
            str(job["default_instruction"]),
            cast(OutputDtype, job["output_dtype"]),
        )
        self.folder = Path(job["folder"]) if "folder" in job else None
        self._dataset = _open_lance(output) if job["format"] == "lance" else _open_parquet(output)
        self._has_text = "text" in self._dataset.schema.names

    def search(self, query: NDArray[np.float32], limit: int) -> list[Hit]:
        """The `limit` rows of the largest cosine to `query`, the best first. Rows with an error are left out."""
        found: list[tuple[float, int, str, str]] = []
        num_rows = 0
        for ids, values, texts in self._batches():
            vectors = dequantize(values, self.output_dtype, len(query))
            scores = (vectors @ query) / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query) + 1e-12)
            best = np.argsort(-scores, kind="stable")[:limit]
            found += [(-float(scores[row]), num_rows + int(row), ids[row], texts[row] or "") for row in best]
            found = sorted(found)[:limit]
            num_rows += len(ids)
        return [Hit(row_id, *split_page(row_id), -score, text) for score, _, row_id, text in found]

    def _batches(self) -> Iterator[tuple[list[str], NDArray[Any], list[Any]]]:
        columns = ["id", "embedding", *(["text"] if self._has_text else [])]
        for batch in self._dataset.to_batches(columns=columns, batch_size=8192):
            embedded = batch.filter(batch.column("embedding").is_valid())
            column = embedded.column("embedding")
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
            texts = embedded.column("text").to_pylist() if self._has_text else [""] * len(column)
            yield [str(one) for one in embedded.column("id").to_pylist()], values, texts


def _open_parquet(output: Path) -> Any:
    files = sorted(str(path) for path in output.glob("part-*.parquet"))
    if not files:
        raise ValueError(f"{output} has no rows yet; run embedder.bulk until it has finished")
    return pa.dataset.dataset(files, format="parquet")


def _open_lance(output: Path) -> Any:
    import lance

    try:
        return lance.dataset(str(output))
    except ValueError as error:
        raise ValueError(f"{output} has no rows yet; run embedder.bulk until it has finished") from error
