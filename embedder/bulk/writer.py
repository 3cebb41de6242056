"""The batches of a part -> one Parquet file or one Lance fragment, complete or absent.

Files are written under a temporary name, synced, and renamed. The fragments of a Lance data set are recorded in a file
each, and committed together at the end.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from embedder.engine.postprocess import OutputDtype

OutputFormat = Literal["parquet", "lance"]
STATE_FOLDER = "_bulk"  # in the output folder; readers of pyarrow and Lance ignore it

_VALUES: dict[str, pa.DataType] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "uint8": pa.uint8(),
    "binary": pa.int8(),
    "ubinary": pa.uint8(),
}


def output_schema(
    id_type: pa.DataType,
    dimensions: int,
    output_dtype: OutputDtype,
    *,
    has_text: bool = False,
    has_thumbnail: bool = False,
) -> pa.Schema:
    """Columns of the output. Of `embedding` and `error` one is null. `text`: the text layer of a document's page.
    `thumbnail`: JPEG.
    """
    num_values = (dimensions + 7) // 8 if output_dtype in ("binary", "ubinary") else dimensions
    return pa.schema(
        {
            "id": id_type,
            "embedding": pa.list_(_VALUES[output_dtype], num_values),
            "num_tokens": pa.int32(),
            "num_cut_tokens": pa.int32(),
            "error": pa.string(),
            **({"text": pa.string()} if has_text else {}),
            **({"thumbnail": pa.binary()} if has_thumbnail else {}),
        }
    )


class Writer:
    """Writes the parts of an output."""

    def __init__(self, output: Path, output_format: OutputFormat) -> None:
        self.output, self.output_format = output, output_format
        self.state_folder = output / STATE_FOLDER

    def is_written(self, number: int) -> bool:
        """Whether the part is complete."""
        return self._final(number).exists()

    def write(self, number: int, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        """Write a part. If a batch or the disk fails, the part stays absent."""
        temporary = self.state_folder / f"{number}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                if self.output_format == "parquet":
                    with pq.ParquetWriter(file, schema) as writer:
                        for batch in batches:
                            writer.write_batch(batch)
                else:
                    file.write(self._write_fragment(schema, batches).encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._final(number))
        finally:
            temporary.unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Remove temporary files of a killed run. Lance data files without a record stay; they are never read."""
        for path in self.state_folder.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def commit(self, schema: pa.Schema, numbers: Sequence[int]) -> None:
        """Make one Lance data set of all parts, in order. Idempotent. Parquet files need no commit."""
        if self.output_format == "lance":
            import lance

            records = [record for number in numbers for record in json.loads(self._final(number).read_text())]
            fragments = [lance.FragmentMetadata.from_json(json.dumps(record)) for record in records]
            lance.LanceDataset.commit(str(self.output), lance.LanceOperation.Overwrite(schema, fragments))

    def count_errors(self, numbers: Sequence[int]) -> int:
        """Number of rows with an error in the whole output, after `commit`."""
        if self.output_format == "lance":
            import lance

            return int(lance.dataset(str(self.output)).count_rows("error IS NOT NULL"))
        columns = (pq.read_table(self._final(number), columns=["error"]).column(0) for number in numbers)
        return sum(len(column) - column.null_count for column in columns)

    def _final(self, number: int) -> Path:
        is_parquet = self.output_format == "parquet"
        return self.output / f"part-{number:07}.parquet" if is_parquet else self.state_folder / f"{number:07}.fragment"

    def _write_fragment(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> str:
        import lance

        reader = pa.RecordBatchReader.from_batches(schema, batches)
        fragments = lance.fragment.write_fragments(reader, str(self.output), schema=schema, mode="create")
        return json.dumps([fragment.to_json() for fragment in fragments])
