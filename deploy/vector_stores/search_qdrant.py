"""Search a folder of pictures by text with Qdrant: `python search_qdrant.py FOLDER "red heart"`.

Asks the service at EMBEDDINGS_URL (http://localhost:3000). pip install httpx qdrant-client.
"""

import base64
import os
import pathlib
import sys

import httpx
from qdrant_client import QdrantClient, models

URL = os.environ.get("EMBEDDINGS_URL", "http://localhost:3000")
FOUND = "Retrieve images or text relevant to the user's query."
SMALL = 64  # the first values of a vector are a smaller one


def embed(path: str, inputs: list[str], **options: str) -> list[list[float]]:
    """Unit vectors."""
    answer = httpx.post(f"{URL}{path}", json={"input": inputs, **options}, timeout=600)
    return answer.raise_for_status().json()["embedding"]


def index(client: QdrantClient, folder: pathlib.Path) -> None:
    """Both vectors of each picture, 64 pictures a request. COSINE brings the small one to unit length again."""
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
    """Names and cosines: 20 times as many by the small vectors as are wanted, those ranked by the full ones."""
    (vector,) = embed("/txt/embed", [query], instruction=FOUND)
    first = models.Prefetch(query=vector[:SMALL], using="small", limit=20 * limit)
    found = client.query_points("pictures", prefetch=first, query=vector, using="full", limit=limit)
    return [(point.payload["name"], point.score) for point in found.points]


if __name__ == "__main__":
    client = QdrantClient(":memory:")  # of a server: QdrantClient(url="http://localhost:6333")
    index(client, pathlib.Path(sys.argv[1]))
    for name, cosine in search(client, sys.argv[2]):
        print(f"{cosine:.3f} {name}")
