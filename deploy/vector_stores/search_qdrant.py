"""Search images or pages by text with Qdrant: `python search_qdrant.py FOLDER "pizza"`.

FOLDER has PNG pictures, or is the output of `embedder.bulk`, whose pages are named `report.pdf#page=3`.

Needs the service at EMBEDDINGS_URL (default http://localhost:3000). Install: pip install httpx qdrant-client pyarrow.
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
from qdrant_client import QdrantClient, models

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


def index(client: QdrantClient, folder: pathlib.Path) -> None:
    """Store a short and a full vector per row. COSINE normalizes the short one."""
    num_rows = 0
    for names, vectors in read(folder):
        if not num_rows:
            sizes = {"small": SMALL, "full": len(vectors[0])}
            distances = {
                name: models.VectorParams(size=size, distance=models.Distance.COSINE) for name, size in sizes.items()
            }
            client.create_collection("pictures", vectors_config=distances)
        points = [
            models.PointStruct(
                id=num_rows + place, vector={"small": vector[:SMALL], "full": vector}, payload={"name": name}
            )
            for place, (name, vector) in enumerate(zip(names, vectors.tolist(), strict=True))
        ]
        num_rows += len(names)
        client.upsert("pictures", points)


def search(client: QdrantClient, query: str, limit: int = 5) -> list[tuple[str, float]]:
    """Names and cosines. The short vectors select 20 * limit candidates; the full vectors rank them."""
    (vector,) = embed("/txt/embed", [query], instruction=INSTRUCTION).tolist()
    first = models.Prefetch(query=vector[:SMALL], using="small", limit=20 * limit)
    found = client.query_points("pictures", prefetch=first, query=vector, using="full", limit=limit)
    return [(point.payload["name"], point.score) for point in found.points]


if __name__ == "__main__":
    client = QdrantClient(":memory:")  # with a server: QdrantClient(url="http://localhost:6333")
    index(client, pathlib.Path(sys.argv[1]))
    for name, cosine in search(client, sys.argv[2]):
        print(f"{cosine:.3f} {name}")
