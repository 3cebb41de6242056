"""Searching in two stages: the first values of all vectors, then the whole vectors of the candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder.engine.postprocess import quantize

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

import pyarrow

from embedder.bulk.writer import Writer, output_schema
from embedder.search.collection import Collection
from embedder.search.index import Index


@pytest.mark.parametrize(
    ("output_format", "output_dtype"),
    [
        ("parquet", "int8"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("parquet", "float32"), ("parquet", "ubinary"), ("lance", "float32"))
        ),
    ],
)
def test_two_stages_find_what_comparing_all_values_finds(output_format: Any, output_dtype: Any, tmp_path: Path) -> None:
    """Matryoshka vectors: the first values hold most of the information."""
    rng = np.random.default_rng(3)
    num_rows, num_values = 3000, 512
    scale = (1.0 / np.arange(1, num_values + 1) ** 0.5).astype(np.float32)
    vectors = rng.standard_normal((num_rows, num_values), np.float32) * scale
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    schema = output_schema(pyarrow.string(), num_values, output_dtype)
    kind = schema.field("embedding").type
    writer = Writer(tmp_path, output_format)
    writer.state_folder.mkdir()
    job = {"model": "m", "dimensions": num_values, "default_instruction": "", "format": output_format}
    (writer.state_folder / "job.json").write_text(json.dumps({**job, "output_dtype": output_dtype}))
    for number in range(3):
        rows = range(1000 * number, 1000 * (number + 1))
        values = quantize(vectors[rows.start : rows.stop], output_dtype)
        failed = pyarrow.array([row % 7 == 0 for row in rows])
        columns = [
            pyarrow.array([str(row) for row in rows]),
            pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), type=kind, mask=failed),
            *[pyarrow.array([1] * 1000, pyarrow.int32())] * 2,
            pyarrow.array(["bad" if row % 7 == 0 else None for row in rows], pyarrow.string()),
        ]
        batch = pyarrow.record_batch(columns, schema=schema)
        writer.write(number, schema, iter([batch.slice(0, 512), batch.slice(512)]))
    writer.commit(schema, range(3))
    collection = Collection(tmp_path)
    index = Index(collection, 128)
    recalls = []
    for row in range(1, 300, 13):
        query = vectors[row] + 0.7 * rng.standard_normal(num_values, np.float32) * scale / np.linalg.norm(scale)
        exact, found = collection.search(query, 10), index.search(query, 10)
        scores = {hit.id: hit.score for hit in exact}
        for hit in found:  # the order is that of the whole vectors
            assert scores.get(hit.id, hit.score) == pytest.approx(hit.score, abs=1e-5)
        assert all(int(hit.id) % 7 for hit in found)
        recalls.append(len({hit.id for hit in found} & scores.keys()) / 10)
    assert np.mean(recalls) > 0.9  # with signs only, 0.93
    everything = Index(collection, num_values).search(query, 10)
    assert [(hit.id, hit.row) for hit in everything] == [(hit.id, hit.row) for hit in exact]
