"""Search images or pages by text with LanceDB: `python search_lancedb.py FOLDER "pizza"`.

FOLDER has PNG pictures, or is the output of `embedder.bulk`, whose pages are named `report.pdf#page=3`.

Needs the service at EMBEDDINGS_URL (default http://localhost:3000). Install: pip install httpx lancedb. The database is
written to the folder `pictures`.
"""

import base64
import os
import pathlib
import sys
from collections.abc import Iterator

import httpx
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

URL = os.environ.get("EMBEDDINGS_URL", "http://localhost:3000")
INSTRUCTION = "Retrieve images or text relevant to the user's query."
SMALL = 64  # the first values of a vector are a shorter vector


def embed(path: str, inputs: list[str], **options: str) -> np.ndarray:
    """Unit vectors, one per row."""
    response = httpx.post(f"{URL}{path}", json={"input": inputs, **options}, timeout=600)
    return np.array(response.raise_for_status().json()["embedding"], np.float32)


def read(folder: pathlib.Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and unit vectors: the rows that `embedder.bulk` has written to the folder, or 64 pictures at a time."""
    for file in sorted(folder.glob("part-*.parquet")):
        rows = pq.read_table(file, columns=["id", "embedding"], filters=pc.field("error").is_null())
        if rows.num_rows:
            yield rows["id"].to_pylist(), np.stack(rows["embedding"].to_numpy())
    pictures = sorted(folder.glob("*.png"))
    for start in range(0, len(pictures), 64):
        batch = pictures[start : start + 64]
        data = [base64.b64encode(path.read_bytes()).decode() for path in batch]
        yield [path.stem for path in batch], embed("/img/embed", data)


def index(database: lancedb.DBConnection, folder: pathlib.Path) -> lancedb.table.Table:
    """Store a short and a full vector per row."""
    batches = []
    for names, vectors in read(folder):
        columns = {"name": names, "small": vectors[:, :SMALL], "full": vectors}
        columns |= {
            name: pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(columns[name]).ravel(), columns[name].shape[1])
            for name in ("small", "full")
        }
        batches.append(pa.table(columns))
    return database.create_table("pictures", pa.concat_tables(batches), mode="overwrite")


def search(table: lancedb.table.Table, query: str, limit: int = 5) -> list[tuple[str, float]]:
    """Names and cosines. The short vectors select 20 * limit candidates; the full vectors rank them."""
    (vector,) = embed("/txt/embed", [query], instruction=INSTRUCTION)
    some = table.search(vector[:SMALL], vector_column_name="small").distance_type("cosine").limit(20 * limit).to_arrow()
    cosines = np.stack(some["full"].to_numpy()) @ vector  # unit vectors: the dot product is the cosine
    best = np.argsort(-cosines)[:limit]
    return [(some["name"][int(place)].as_py(), float(cosines[place])) for place in best]


if __name__ == "__main__":
    table = index(lancedb.connect("pictures"), pathlib.Path(sys.argv[1]))
    for name, cosine in search(table, sys.argv[2]):
        print(f"{cosine:.3f} {name}")
