"""Search images or pages by text with Milvus Lite: `python search_milvus.py FOLDER "pizza"`.

FOLDER has PNG pictures, or is the output of `embedder.bulk`, whose pages are named `report.pdf#page=3`.

Needs the service at EMBEDDINGS_URL (default http://localhost:3000). Install: pip install httpx pymilvus milvus-lite
pyarrow.
"""

import base64
import os
import pathlib
import sys
from collections.abc import Iterator

import httpx
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pymilvus import DataType, MilvusClient

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


def index(client: MilvusClient, folder: pathlib.Path) -> None:
    """Store a short and a full vector per row."""
    num_rows = 0
    for names, vectors in read(folder):
        if not num_rows:
            create_collection(client, len(vectors[0]))
        rows = [
            {"id": num_rows + place, "name": name, "small": vector[:SMALL], "full": vector}
            for place, (name, vector) in enumerate(zip(names, vectors.tolist(), strict=True))
        ]
        num_rows += len(names)
        client.insert("pictures", rows)


def create_collection(client: MilvusClient, dimensions: int) -> None:
    """COSINE normalizes the short vectors. AUTOINDEX compares all vectors in Milvus Lite; a server builds an index."""
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("name", DataType.VARCHAR, max_length=4096)
    index = client.prepare_index_params()
    for name, size in {"small": SMALL, "full": dimensions}.items():
        schema.add_field(name, DataType.FLOAT_VECTOR, dim=size)
        index.add_index(name, index_type="AUTOINDEX", metric_type="COSINE")
    if client.has_collection("pictures"):
        client.drop_collection("pictures")
    client.create_collection("pictures", schema=schema, index_params=index)


def search(client: MilvusClient, query: str, limit: int = 5) -> list[tuple[str, float]]:
    """Names and cosines. The short vectors select 20 * limit candidates; the full vectors rank them."""
    (vector,) = embed("/txt/embed", [query], instruction=INSTRUCTION)
    client.load_collection("pictures")
    short = [vector[:SMALL].tolist()]
    (some,) = client.search("pictures", short, anns_field="small", limit=20 * limit, output_fields=["name", "full"])
    cosines = np.array([found["entity"]["full"] for found in some], np.float32) @ vector  # unit vectors
    best = np.argsort(-cosines)[:limit]
    return [(some[int(place)]["entity"]["name"], float(cosines[place])) for place in best]


if __name__ == "__main__":
    client = MilvusClient("pictures.db")  # with a server: MilvusClient("http://localhost:19530")
    index(client, pathlib.Path(sys.argv[1]))
    for name, cosine in search(client, sys.argv[2]):
        print(f"{cosine:.3f} {name}")
