"""A part's batches -> one Parquet file, or one Lance fragment, that is there whole or not at all.

Both are written under another name, synced, and renamed. A Lance data set comes to be by one commit of all fragments at
the end; until then each is recorded in a file of its own.
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
NOTES = "_bulk"  # our folder beside the data; pyarrow's and Lance's readers pass it by

_VALUES: dict[str, pa.DataType] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "uint8": pa.uint8(),
    "binary": pa.int8(),
    "ubinary": pa.uint8(),
}


def output_schema(id_type: pa.DataType, dimensions: int, output_dtype: OutputDtype) -> pa.Schema:
    """`embedding` is null where `error` is not."""
    num_values = (dimensions + 7) // 8 if output_dtype in ("binary", "ubinary") else dimensions
    return pa.schema(
        {
            "id": id_type,
            "embedding": pa.list_(_VALUES[output_dtype], num_values),
            "num_tokens": pa.int32(),
            "num_cut_tokens": pa.int32(),
            "error": pa.string(),
        }
    )


class Writer:
    """Where the parts of an output go."""

    def __init__(self, output: Path, output_format: OutputFormat) -> None:
        self.output, self.output_format = output, output_format
        self.notes = output / NOTES

    def is_written(self, number: int) -> bool:
        """Whether that part is there."""
        return self._final(number).exists()

    def write(self, number: int, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        """All of the part, or, if a batch or the disk fails, nothing that counts."""
        temporary = self.notes / f"{number}.{uuid.uuid4().hex}.tmp"
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
        """What a killed run left. Of Lance data files without a record are left too: they are never read."""
        for path in self.notes.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def commit(self, schema: pa.Schema, numbers: Sequence[int]) -> None:
        """Make one data set of all parts, in order. Twice gives the same."""
        if self.output_format == "lance":
            import lance

            records = [record for number in numbers for record in json.loads(self._final(number).read_text())]
            fragments = [lance.FragmentMetadata.from_json(json.dumps(record)) for record in records]
            lance.LanceDataset.commit(str(self.output), lance.LanceOperation.Overwrite(schema, fragments))

    def _final(self, number: int) -> Path:
        is_parquet = self.output_format == "parquet"
        return self.output / f"part-{number:07}.parquet" if is_parquet else self.notes / f"{number:07}.fragment"

    def _write_fragment(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> str:
        import lance

        reader = pa.RecordBatchReader.from_batches(schema, batches)
        fragments = lance.fragment.write_fragments(reader, str(self.output), schema=schema, mode="create")
        return json.dumps([fragment.to_json() for fragment in fragments])
