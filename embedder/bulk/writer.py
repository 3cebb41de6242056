"""The batches of a part -> one Parquet file or one Lance fragment, complete or absent. Later, rows are taken out of it.

Files are written under a temporary name, synced, and renamed. The fragments of a Lance data set are recorded in a file
each, and committed together at the end.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from embedder.bulk.options import OutputFormat
from embedder.engine.postprocess import OutputDtype

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
    has_segments: bool = False,
) -> pa.Schema:
    """Columns of the output. One of `embedding` and `error` is null. `text`: the text layer of a document's page.
    `thumbnail`: JPEG. `start_s`, `end_s`: seconds at which a clip's segment starts and ends.
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
            **({"start_s": pa.float64(), "end_s": pa.float64()} if has_segments else {}),
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
        for pattern in ("*.tmp", "*.progress"):
            for path in self.state_folder.glob(pattern):
                path.unlink(missing_ok=True)

    def remove_parts_except(self, numbers: Iterable[int]) -> None:
        """Remove the parts that have none of these numbers."""
        kept = {self._final(number) for number in numbers}
        for path in self._final(0).parent.glob("part-*.parquet" if self.output_format == "parquet" else "*.fragment"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def keep_rows(self, number: int, ids: set[str]) -> None:
        """Take the rows that have none of these ids out of a part, if it is written. Idempotent."""
        if self.is_written(number):
            batches = self._read(number)
            wanted = pa.array(sorted(ids), pa.string())
            kept = [batch.filter(pyarrow.compute.is_in(batch.column("id"), wanted)) for batch in batches]
            if sum(len(batch) for batch in kept) < sum(len(batch) for batch in batches):
                self.write(number, kept[0].schema, iter(kept))

    def commit(self, schema: pa.Schema, numbers: Sequence[int]) -> None:
        """Make one Lance data set of all parts, in order. Idempotent. Parquet files need no commit."""
        if self.output_format == "lance":
            import lance

            records = [record for number in numbers for record in json.loads(self._final(number).read_text())]
            fragments = [lance.FragmentMetadata.from_json(json.dumps(record)) for record in records]
            lance.LanceDataset.commit(str(self.output), lance.LanceOperation.Overwrite(schema, fragments))

    def count_errors(self, numbers: Sequence[int]) -> Counter[str]:
        """Number of rows with an error in the whole output, by the error's code, after `commit`."""
        if self.output_format == "lance":
            import lance

            tables = [lance.dataset(str(self.output)).to_table(["error"], filter="error IS NOT NULL")]
        else:
            tables = [pq.read_table(self._final(number), columns=["error"]) for number in numbers]
        return Counter(error.partition(":")[0] for table in tables for error in table.column(0).drop_null().to_pylist())

    def _read(self, number: int) -> list[pa.RecordBatch]:
        """The rows of a part that is written."""
        if self.output_format == "parquet":
            return list(pq.ParquetFile(self._final(number)).iter_batches())
        from lance.file import LanceFileReader

        files = [file["path"] for record in json.loads(self._final(number).read_text()) for file in record["files"]]
        return [
            batch
            for file in files
            for batch in LanceFileReader(str(self.output / "data" / file)).read_all().to_batches()
        ]

    def _final(self, number: int) -> Path:
        is_parquet = self.output_format == "parquet"
        return self.output / f"part-{number:07}.parquet" if is_parquet else self.state_folder / f"{number:07}.fragment"

    def _write_fragment(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> str:
        import lance

        reader = pa.RecordBatchReader.from_batches(schema, batches)
        mode = "append" if (self.output / "_versions").exists() else "create"  # fragments are committed later, by us
        fragments = lance.fragment.write_fragments(reader, str(self.output), schema=schema, mode=mode)
        return json.dumps([fragment.to_json() for fragment in fragments])


def replace_file(path: Path, text: str) -> None:
    """Write the file completely or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
