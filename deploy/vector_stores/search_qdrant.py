"""Search a folder of images by text with Qdrant: `python search_qdrant.py FOLDER "red heart"`.

Needs the service at EMBEDDINGS_URL (default http://localhost:3000). Install: pip install httpx qdrant-client.
"""

import base64
import os
import pathlib
import sys

import httpx
from qdrant_client import QdrantClient, models

URL = os.environ.get("EMBEDDINGS_URL", "http://localhost:3000")
INSTRUCTION = "Retrieve images or text relevant to the user's query."
SMALL = 64  # the first values of a vector are a shorter vector


def embed(path: str, inputs: list[str], **options: str) -> list[list[float]]:
    """Unit vectors."""
    response = httpx.post(f"{URL}{path}", json={"input": inputs, **options}, timeout=600)
    return response.raise_for_status().json()["embedding"]


def index(client: QdrantClient, folder: pathlib.Path) -> None:
    """Store a short and a full vector per image, 64 images per request. COSINE normalizes the short one."""
    pictures = sorted(folder.glob("*.png"))
    for start in range(0, len(pictures), 64):
        batch = pictures[start : start + 64]
        vectors = embed("/img/embed", [base64.b64encode(path.read_bytes()).decode() for path in batch])
        if start == 0:
            sizes = {"small": SMALL, "full": len(vectors[0])}
            distances = {
                name: models.VectorParams(size=size, distance=models.Distance.COSINE) for name, size in sizes.items()
            }
            client.create_collection("pictures", vectors_config=distances)
        points = [
            models.PointStruct(
                id=start + place, vector={"small": vector[:SMALL], "full": vector}, payload={"name": path.stem}
            )
            for place, (path, vector) in enumerate(zip(batch, vectors, strict=True))
        ]
        client.upsert("pictures", points)


def search(client: QdrantClient, query: str, limit: int = 5) -> list[tuple[str, float]]:
    """Names and cosines. The short vectors select 20 * limit candidates; the full vectors rank them."""
    (vector,) = embed("/txt/embed", [query], instruction=INSTRUCTION)
    first = models.Prefetch(query=vector[:SMALL], using="small", limit=20 * limit)
    found = client.query_points("pictures", prefetch=first, query=vector, using="full", limit=limit)
    return [(point.payload["name"], point.score) for point in found.points]


if __name__ == "__main__":
    client = QdrantClient(":memory:")  # with a server: QdrantClient(url="http://localhost:6333")
    index(client, pathlib.Path(sys.argv[1]))
    for name, cosine in search(client, sys.argv[2]):
        print(f"{cosine:.3f} {name}")
