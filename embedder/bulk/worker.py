"""One part -> its vectors in the output, through the engine of `Embedder`. One worker for each device, or more.

Rows are submitted as they are read; the engine's queue, kept short here, holds the reader back. So memory does not
depend on the size of a part, and what runs together is the scheduler's choice, across the parts that are read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedder.bulk.formats import BROKEN_FILE, Part
from embedder.bulk.source import Columns, Row, Source
from embedder.bulk.writer import OutputFormat, Writer, output_schema
from embedder.embedder import Embedder
from embedder.engine.postprocess import Embedding, OutputDtype, quantize
from embedder.errors import EmbedderError, EngineFailed
from embedder.inputs.items import item_from_fields
from embedder.settings import Settings

PARTS_AT_ONCE = 4  # a worker's: the device has work while a part ends, and files are waited for together
BATCH_ROWS = 512  # of the output
QUEUED_BATCHES = 4  # of the engine's token budget

Outcome = tuple[Any, Future[Embedding] | EmbedderError]  # with the row's id


@dataclass(frozen=True)
class Job:
    """What is the same for every part."""

    input: Path
    output: Path
    output_format: OutputFormat
    columns: Columns
    dimensions: int | None
    output_dtype: OutputDtype
    settings: Settings


class Worker:
    """What Ray calls: part in, counts out. Raises `EngineFailed` where the engine can embed nothing any more."""

    def __init__(self, job: Job) -> None:
        queued = min(job.settings.max_queued_tokens, QUEUED_BATCHES * job.settings.max_batch_tokens)
        self.job = job
        self.source = Source(job.input, job.columns, job.settings)
        self.embedder = Embedder(settings=job.settings.model_copy(update={"max_queued_tokens": queued}))
        dimensions = job.dimensions or self.embedder.engine.hidden_size
        self.schema = output_schema(self.source.id_type, dimensions, job.output_dtype)
        self.writer = Writer(job.output, job.output_format)

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """`rows` and how many of them are `errors`; or `fault`: why the part's file cannot be read or written."""
        part = Part.from_json(row["part"])
        counts = {"rows": 0, "errors": 0, "fault": ""}
        try:
            self.writer.write(part.number, self.schema, self._batches(part, counts))
        except BROKEN_FILE as error:
            counts["fault"] = f"{part.path or part.names[0]}: {type(error).__name__}: {error}"
        return counts

    def _batches(self, part: Part, counts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        """The part's rows, a batch behind those that are submitted."""
        outcomes: list[Outcome] = []
        for row in self.source.rows(part):
            outcomes.append((row.id, self._submit(row)))
            if len(outcomes) == 2 * BATCH_ROWS:
                yield self._batch(outcomes[:BATCH_ROWS], counts)
                del outcomes[:BATCH_ROWS]
        for start in range(0, len(outcomes), BATCH_ROWS):
            yield self._batch(outcomes[start : start + BATCH_ROWS], counts)

    def _submit(self, row: Row) -> Future[Embedding] | EmbedderError:
        if isinstance(row.fields, EmbedderError):
            return row.fields
        try:
            item = item_from_fields({**row.fields, "dimensions": self.job.dimensions})
            return self.embedder.engine.submit(item, wait=True)
        except EmbedderError as error:
            return error

    def _batch(self, outcomes: Sequence[Outcome], counts: dict[str, Any]) -> pa.RecordBatch:
        results = [_result(outcome) for _, outcome in outcomes]
        failed = [one for one in results if isinstance(one, EmbedderError)]
        if any(isinstance(one, EngineFailed) for one in failed):
            self.embedder.embed(["Was it the row, or the device?"])  # if this fails too, no row is to blame
        counts["rows"] += len(results)
        counts["errors"] += len(failed)
        embedded = [one if isinstance(one, Embedding) else None for one in results]
        columns = [
            pa.array([row_id for row_id, _ in outcomes], self.schema.field("id").type),
            self._vectors(embedded),
            pa.array([one and one.num_tokens for one in embedded], pa.int32()),
            pa.array([one and one.num_cut_tokens for one in embedded], pa.int32()),
            pa.array([_shown(one) if isinstance(one, EmbedderError) else None for one in results], pa.string()),
        ]
        return pa.record_batch(columns, schema=self.schema)

    def _vectors(self, embedded: Sequence[Embedding | None]) -> pa.Array:
        """(rows, values), null where there is none."""
        kind = self.schema.field("embedding").type
        values = np.zeros((len(embedded), kind.list_size), kind.value_type.to_pandas_dtype())
        for place, one in enumerate(embedded):
            if one is not None:
                values[place] = quantize(one.vector, self.job.output_dtype)
        is_null = pa.array([one is None for one in embedded])
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind, mask=is_null)


def _result(outcome: Future[Embedding] | EmbedderError) -> Embedding | EmbedderError:
    if isinstance(outcome, EmbedderError):
        return outcome
    try:
        return outcome.result()
    except EmbedderError as error:
        return error


def _shown(error: EmbedderError) -> str:
    return f"{error.code}: {error}".encode("utf-8", "backslashreplace").decode()
