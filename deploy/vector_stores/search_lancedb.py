"""Search a folder of pictures by text with LanceDB: `python search_lancedb.py FOLDER "red heart"`.

Asks the service at EMBEDDINGS_URL (http://localhost:3000). pip install httpx lancedb. The folder `pictures` is made.
"""

import base64
import os
import pathlib
import sys

import httpx
import lancedb
import numpy as np
import pyarrow as pa

URL = os.environ.get("EMBEDDINGS_URL", "http://localhost:3000")
FOUND = "Retrieve images or text relevant to the user's query."
SMALL = 64  # the first values of a vector are a smaller one


def embed(path: str, inputs: list[str], **options: str) -> np.ndarray:
    """Unit vectors, one a row."""
    answer = httpx.post(f"{URL}{path}", json={"input": inputs, **options}, timeout=600)
    return np.array(answer.raise_for_status().json()["embedding"], np.float32)


def index(database: lancedb.DBConnection, folder: pathlib.Path) -> lancedb.table.Table:
    """Both vectors of each picture, 64 pictures a request."""
    pictures = sorted(folder.glob("*.png"))
    batches = []
    for start in range(0, len(pictures), 64):
        batch = pictures[start : start + 64]
        vectors = embed("/img/embed", [base64.b64encode(path.read_bytes()).decode() for path in batch])
        columns = {"name": [path.stem for path in batch], "small": vectors[:, :SMALL], "full": vectors}
        columns |= {
            name: pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(columns[name]).ravel(), columns[name].shape[1])
            for name in ("small", "full")
        }
        batches.append(pa.table(columns))
    return database.create_table("pictures", pa.concat_tables(batches), mode="overwrite")


def search(table: lancedb.table.Table, query: str, limit: int = 5) -> list[tuple[str, float]]:
    """Names and cosines: 20 times as many by the small vectors as are wanted, those ranked by the full ones."""
    (vector,) = embed("/txt/embed", [query], instruction=FOUND)
    some = table.search(vector[:SMALL], vector_column_name="small").distance_type("cosine").limit(20 * limit).to_arrow()
    cosines = np.stack(some["full"].to_numpy()) @ vector  # unit vectors: the dot product is the cosine
    best = np.argsort(-cosines)[:limit]
    return [(some["name"][int(place)].as_py(), float(cosines[place])) for place in best]


if __name__ == "__main__":
    table = index(lancedb.connect("pictures"), pathlib.Path(sys.argv[1]))
    for name, cosine in search(table, sys.argv[2]):
        print(f"{cosine:.3f} {name}")
