"""An output of `embedder.bulk` -> the rows whose vectors are nearest to a query.

Every vector is compared: a single search reads all of them from the disk anyway, so smaller vectors would save nothing.
They are read in batches; ids and texts are read only for the best rows. For many searches, use `index`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.dataset
from numpy.typing import NDArray

from embedder.bulk.pages import split_page
from embedder.bulk.segments import Segment, format_seconds, split_segment
from embedder.bulk.writer import STATE_FOLDER
from embedder.engine.postprocess import OutputDtype, dequantize
from embedder.errors import EmbedderError

Batch = tuple[list[str], NDArray[np.float32], list[str]]  # ids, vectors (num_rows, num_values), and texts


@dataclass(frozen=True)
class Hit:
    """A row that was found. `page`: 0 for a file without pages. `text`: the page's text layer, if it has one.

    `row`: its number among the rows that have a vector. `score`: the cosine. `reranked`: what a reranker says, a
    probability or why there is none; None if it was not asked.
    """

    row: int
    id: str
    file: str
    page: int
    score: float
    text: str
    reranked: float | EmbedderError | None = None

    @property
    def segment(self) -> Segment | None:
        """Start and end in seconds, of a clip's segment."""
        return split_segment(self.id)[1] if self.id != self.file else None

    @property
    def place(self) -> str:
        """Number of the page or seconds of the segment, for display; empty for a whole file."""
        return "-".join(map(format_seconds, self.segment)) if self.segment else str(self.page or "")


class Collection:
    """A finished output. Raises `ValueError` if the folder is none.

    `model`: name and revision of the checkpoint. `dimensions`: the vectors' size; None: the model's. `folder`: the
    input's. `input`: the input itself, with the names of its `columns`. The last three are None in outputs of older
    versions.
    """

    def __init__(self, output: Path) -> None:
        self.state = output / STATE_FOLDER
        state = self.state / "job.json"
        if not state.is_file():
            raise ValueError(f"{output} is not an output of embedder.bulk: it has no {STATE_FOLDER}/job.json")
        job = json.loads(state.read_text())
        self.model = str(job["model"])
        self.dimensions: int | None = job["dimensions"]
        self.default_instruction = str(job["default_instruction"])
        self.output_dtype = cast(OutputDtype, job["output_dtype"])
        self.folder = Path(job["folder"]) if "folder" in job else None
        self.input = Path(job["input"]) if "input" in job else None
        self.columns: dict[str, str | None] = job.get("columns", {})
        self._dataset = _open_lance(output) if job["format"] == "lance" else _open_parquet(output)
        self._has_text = "text" in self._dataset.schema.names

    @property
    def num_values(self) -> int:
        """Number of values that a vector stands for."""
        size: int = self._dataset.schema.field("embedding").type.list_size
        return self.dimensions or (8 * size if self.output_dtype in ("binary", "ubinary") else size)

    def search(self, query: NDArray[np.float32], limit: int) -> list[Hit]:
        """The `limit` rows of the largest cosine to `query`, the best first. Rows with an error are left out."""
        found: list[tuple[float, int, int]] = []  # score, number of the row, and its place in the output
        num_rows = first = 0
        for batch in self._dataset.to_batches(columns=["embedding"], batch_size=8192):
            column = batch.column(0)
            places = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            scores = cosines(self._vectors(column.drop_null() if column.null_count else column), query)
            best = np.argsort(-scores, kind="stable")[:limit]
            found += [(-float(scores[row]), num_rows + int(row), first + int(places[row])) for row in best]
            found = sorted(found)[:limit]
            num_rows += len(scores)
            first += len(batch)
        if not found:
            return []
        places_found = sorted(place for _, _, place in found)
        ids, _, texts = self.take(places_found)
        named = dict(zip(places_found, zip(ids, texts, strict=True), strict=True))
        return [
            Hit(row, named[place][0], *split_page(named[place][0]), -score, named[place][1])
            for score, row, place in found
        ]

    def batches(self) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        """Ids and vectors of all rows that have a vector, in order."""
        for batch in self._dataset.to_batches(columns=["id", "embedding"], batch_size=8192):
            yield self._batch(batch)[:2]

    def take(self, places: Sequence[int]) -> Batch:
        """The rows at these places in the output, ascending and with a vector."""
        columns = ["id", "embedding", *(["text"] if self._has_text else [])]
        table = self._read(places, columns)
        return self._batch(table.combine_chunks().to_batches()[0])

    def thumbnail(self, place: int) -> bytes | None:
        """The thumbnail of the row at this place in the output; None if it has none."""
        if "thumbnail" not in self._dataset.schema.names:
            return None
        thumbnail: bytes | None = self._read([place], ["thumbnail"]).column(0)[0].as_py()
        return thumbnail

    def _read(self, places: Sequence[int], columns: list[str]) -> pa.Table:
        """Columns of the rows at these places, ascending."""
        if self._groups is not None:
            tables, first, rest = [], 0, np.asarray(places)
            for group, num_rows in self._groups:
                inside, rest = rest[rest < first + num_rows], rest[rest >= first + num_rows]
                if len(inside):
                    tables.append(group.to_table(columns=columns).take(pa.array(inside - first)))
                first += num_rows
            return pa.concat_tables(tables)
        return self._dataset.take(list(places), columns=columns)

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where in the output the rows with a vector are, for `take`."""
        is_valid = self._dataset.to_table(columns=["error"]).column(0).is_null().to_numpy(zero_copy_only=False)
        return np.flatnonzero(is_valid)

    def part_of(self, row: int) -> tuple[int, int]:
        """Number of the part that has a row, and the row's place in this part, from 0."""
        place, first = int(self.places[row]), 0
        for number, num_rows in self._parts:
            if place < first + num_rows:
                return number, place - first
            first += num_rows
        raise IndexError(f"row {row} of {first}")

    @cached_property
    def _parts(self) -> list[tuple[int, int]]:
        """Numbers of the parts, in the order of their rows, and their numbers of rows."""
        if isinstance(self._dataset, pyarrow.dataset.FileSystemDataset):
            files = [(Path(file.path).stem, file.metadata.num_rows) for file in self._dataset.get_fragments()]
            return [(int(name.removeprefix("part-")), num_rows) for name, num_rows in files]
        written = [(int(path.stem), json.loads(path.read_text())) for path in sorted(self.state.glob("*.fragment"))]
        return [(number, sum(one["physical_rows"] for one in fragments)) for number, fragments in written]

    @cached_property
    def _groups(self) -> list[tuple[Any, int]] | None:
        """Parquet's row groups and their numbers of rows; None of a Lance data set, which reads single rows."""
        if not isinstance(self._dataset, pyarrow.dataset.FileSystemDataset):
            return None
        groups = [group for file in self._dataset.get_fragments() for group in file.split_by_row_group()]
        return [(group, group.row_groups[0].num_rows) for group in groups]  # `count_rows` counts the whole file

    def _batch(self, batch: pa.RecordBatch) -> Batch:
        embedded = batch.filter(batch.column("embedding").is_valid())
        has_text = "text" in embedded.schema.names
        texts = [text or "" for text in embedded.column("text").to_pylist()] if has_text else [""] * len(embedded)
        vectors = self._vectors(embedded.column("embedding"))
        return [str(one) for one in embedded.column("id").to_pylist()], vectors, texts

    def _vectors(self, column: pa.Array) -> NDArray[np.float32]:
        """(num_rows, num_values)."""
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
        return dequantize(values, self.output_dtype, self.num_values)


def cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of each row's first values, as many as the query has, to the query."""
    first = vectors[:, : len(query)]
    lengths = np.sqrt(np.einsum("ij,ij->i", first, first))  # an eighth of the time of np.linalg.norm
    scores: NDArray[np.float32] = (first @ query) / (lengths * np.linalg.norm(query) + 1e-12)
    return scores


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
