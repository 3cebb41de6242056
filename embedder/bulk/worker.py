"""One part -> its vectors in the output, through the engine of `Embedder`. At least one worker per device.

Rows are submitted while they are read. The engine's queue is short here, and a full queue blocks the reader, so memory
does not depend on the size of a part. The scheduler forms batches across all parts that are read at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedder.bulk.formats import FILE_ERRORS, FOLDER, Part
from embedder.bulk.options import OutputFormat
from embedder.bulk.progress import PartCounter, Reporter
from embedder.bulk.segments import Segment
from embedder.bulk.source import Columns, Row, Source, valid_unicode
from embedder.bulk.thumbnails import make_thumbnail
from embedder.bulk.writer import STATE_FOLDER, Writer, output_schema
from embedder.embedder import Embedder
from embedder.engine.observer import Observer
from embedder.engine.postprocess import Embedding, OutputDtype, quantize
from embedder.errors import EmbedderError, EngineFailed
from embedder.inputs.items import item_from_fields
from embedder.settings import Settings

PARTS_AT_ONCE = 4  # of one worker: the device has work while a part ends or a file is slow
OUTPUT_BATCH_ROWS = 512
QUEUED_BATCHES = 4  # limit of the engine's queue, in full batches

# Id, text, segment and thumbnail of a row, and its embedding or error
Submitted = tuple[Any, str | None, Segment | None, bytes | None, Future[Embedding] | EmbedderError]


@dataclass(frozen=True)
class Job:
    """The arguments of the command, the same for every part."""

    input: Path
    output: Path
    output_format: OutputFormat
    columns: Columns
    dimensions: int | None
    output_dtype: OutputDtype
    settings: Settings
    has_text: bool = True  # of the output, if the input is a folder of pictures, clips and documents
    has_thumbnails: bool = False
    segment_s: float | None = None  # of clips


def job_schema(job: Job, source: Source, dimensions: int) -> pa.Schema:
    """The columns of the job's output."""
    return output_schema(
        source.id_type,
        dimensions,
        job.output_dtype,
        has_text=source.format is FOLDER and job.has_text,
        has_thumbnail=job.has_thumbnails,
        has_segments=job.segment_s is not None,
    )


class Worker:
    """A Ray actor: part in, counts out. Raises `EngineFailed` if the engine cannot embed anything anymore.

    `observer`: called by the engine at each stage of an item.
    """

    def __init__(self, job: Job, observer: Observer | None = None) -> None:
        queued = min(job.settings.max_queued_tokens, QUEUED_BATCHES * job.settings.max_batch_tokens)
        self.job = job
        self.source = Source(job.input, job.columns, job.settings, job.output / STATE_FOLDER, job.segment_s)
        settings = job.settings.model_copy(update={"max_queued_tokens": queued})
        self.embedder = Embedder(settings=settings, observer=observer)
        dimensions = job.dimensions or self.embedder.engine.hidden_size
        self.schema = job_schema(job, self.source, dimensions)
        self.writer = Writer(job.output, job.output_format)
        self.reporter = Reporter(self.writer.state_folder)

    def close(self) -> None:
        """End the threads, the processes and the engine."""
        self.reporter.close()
        self.source.close()
        self.embedder.close()

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """Embed a part. Returns its `number`, its numbers of `rows` and of `errors` among them, and its `fault`:
        the file's error, if any.
        """
        part = Part.from_json(row["part"])
        counts = {"number": part.number, "rows": 0, "errors": 0, "fault": ""}
        with self.reporter.counting(part.number) as counter:
            try:
                self.writer.write(part.number, self.schema, self._batches(part, counter, counts))
            except FILE_ERRORS as error:
                counts["fault"] = f"{part.path or part.names[0]}: {type(error).__name__}: {error}"
        return counts

    def _batches(self, part: Part, counter: PartCounter, counts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        """Batches of the part's rows. The rows of the next batch are submitted before a batch is awaited."""
        submitted: list[Submitted] = []
        for row in self.source.rows(part, self.embedder.preprocessor.vision.regime):
            submitted.append((row.id, row.text, row.segment, self._thumbnail(row), self._submit(row, counter)))
            if len(submitted) == 2 * OUTPUT_BATCH_ROWS:
                yield self._batch(submitted[:OUTPUT_BATCH_ROWS], counts)
                del submitted[:OUTPUT_BATCH_ROWS]
        for start in range(0, len(submitted), OUTPUT_BATCH_ROWS):
            yield self._batch(submitted[start : start + OUTPUT_BATCH_ROWS], counts)

    def _thumbnail(self, row: Row) -> bytes | None:
        if not self.job.has_thumbnails or isinstance(row.fields, EmbedderError):
            return None
        return make_thumbnail(row.fields, self.job.settings)

    def _submit(self, row: Row, counter: PartCounter) -> Future[Embedding] | EmbedderError:
        if isinstance(row.fields, EmbedderError):
            counter.add(is_error=True)
            return row.fields
        try:
            item = item_from_fields({**row.fields, "dimensions": self.job.dimensions})
            future = self.embedder.engine.submit(item, wait=True)
        except EmbedderError as error:
            counter.add(is_error=True)
            return error
        future.add_done_callback(lambda done: counter.add(is_error=done.cancelled() or done.exception() is not None))
        return future

    def _batch(self, submitted: Sequence[Submitted], counts: dict[str, Any]) -> pa.RecordBatch:
        results = [_result(one) for *_, one in submitted]
        failed = [one for one in results if isinstance(one, EmbedderError)]
        if any(isinstance(one, EngineFailed) for one in failed):
            self.embedder.embed(["ready?"])  # raises if the engine fails for every input
        counts["rows"] += len(results)
        counts["errors"] += len(failed)
        embedded = [one if isinstance(one, Embedding) else None for one in results]
        columns = [
            pa.array([row_id for row_id, *_ in submitted], self.schema.field("id").type),
            self._vectors(embedded),
            pa.array([one and one.num_tokens for one in embedded], pa.int32()),
            pa.array([one and one.num_cut_tokens for one in embedded], pa.int32()),
            pa.array([_error_text(one) if isinstance(one, EmbedderError) else None for one in results], pa.string()),
        ]
        if "text" in self.schema.names:
            columns.append(pa.array([text for _, text, *_ in submitted], pa.string()))
        if "thumbnail" in self.schema.names:
            columns.append(pa.array([thumbnail for *_, thumbnail, _ in submitted], pa.binary()))
        if "start_s" in self.schema.names:
            segments = [segment or (None, None) for _, _, segment, *_ in submitted]
            columns += [pa.array([segment[side] for segment in segments], pa.float64()) for side in (0, 1)]
        return pa.record_batch(columns, schema=self.schema)

    def _vectors(self, embedded: Sequence[Embedding | None]) -> pa.Array:
        """(num_rows, num_values), null for rows without an embedding."""
        kind = self.schema.field("embedding").type
        values = np.zeros((len(embedded), kind.list_size), kind.value_type.to_pandas_dtype())
        for index, one in enumerate(embedded):
            if one is not None:
                values[index] = quantize(one.vector, self.job.output_dtype)
        is_null = pa.array([one is None for one in embedded])
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind, mask=is_null)


def _result(submitted: Future[Embedding] | EmbedderError) -> Embedding | EmbedderError:
    if isinstance(submitted, EmbedderError):
        return submitted
    try:
        return submitted.result()
    except EmbedderError as error:
        return error


def _error_text(error: EmbedderError) -> str:
    return valid_unicode(f"{error.code}: {error}")


def share_resources(settings: Settings, num_gpus: int, cpus: Sequence[int]) -> tuple[int, dict[str, Any]]:
    """Number of workers, and the resources that Ray reserves for each. `cpus`: number of cores of each node.

    A worker gets a GPU or an equal fraction of one. Without GPUs it gets an equal share of the smallest node's cores,
    which is also torch's number of threads.
    """
    num_workers = settings.num_workers(num_gpus or len(cpus))
    if num_gpus:
        return num_workers, {
            "num_gpus": 1 / math.ceil(num_workers / num_gpus),
            "num_cpus": min(1, sum(cpus) / num_workers),
        }
    cores = min(cpus) / math.ceil(num_workers / len(cpus))
    return num_workers, {"num_cpus": cores if cores < 1 else int(cores)}
