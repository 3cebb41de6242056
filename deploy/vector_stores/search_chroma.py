"""Search images or pages by text with Chroma: `python search_chroma.py FOLDER "pizza"`.

FOLDER has PNG pictures, or is the output of `embedder.bulk`, whose pages are named `report.pdf#page=3`.

Needs the service at EMBEDDINGS_URL (default http://localhost:3000). Install: pip install httpx chromadb pyarrow.
"""

import base64
import os
import pathlib
import sys
from collections.abc import Iterator

import chromadb
import httpx
import numpy as np
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


def index(client: chromadb.ClientAPI, folder: pathlib.Path) -> None:
    """Store a short and a full vector per row, in two collections: a row of Chroma has one vector.

    Only the short ones are searched. `ef_search`: candidates that the index looks at, not fewer than are asked for.
    """
    options = {"hnsw": {"space": "cosine", "ef_search": 200}}
    small, full = (
        client.create_collection(name, configuration=options, embedding_function=None) for name in ("small", "full")
    )
    for names, vectors in read(folder):
        small.add(ids=names, embeddings=vectors[:, :SMALL])
        full.add(ids=names, embeddings=vectors)


def search(client: chromadb.ClientAPI, query: str, limit: int = 5) -> list[tuple[str, float]]:
    """Names and cosines. The short vectors select 20 * limit candidates; the full vectors rank them."""
    small, full = (client.get_collection(name, embedding_function=None) for name in ("small", "full"))
    (vector,) = embed("/txt/embed", [query], instruction=INSTRUCTION)
    num_candidates = min(20 * limit, small.count())
    (names,) = small.query(query_embeddings=vector[None, :SMALL], n_results=num_candidates, include=[])["ids"]
    found = full.get(ids=names, include=["embeddings"])  # in another order
    cosines = np.asarray(found["embeddings"], np.float32) @ vector  # unit vectors: the dot product is the cosine
    best = np.argsort(-cosines)[:limit]
    return [(found["ids"][int(place)], float(cosines[place])) for place in best]


if __name__ == "__main__":
    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.EphemeralClient(settings)  # to keep the vectors: PersistentClient("pictures.chroma", settings)
    index(client, pathlib.Path(sys.argv[1]))
    for name, cosine in search(client, sys.argv[2]):
        print(f"{cosine:.3f} {name}")
