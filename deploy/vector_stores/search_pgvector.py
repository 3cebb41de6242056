"""Search images or pages by text with PostgreSQL: `python search_pgvector.py FOLDER "pizza"`.

FOLDER has PNG pictures, or is the output of `embedder.bulk`, whose pages are named `report.pdf#page=3`.

Needs the service at EMBEDDINGS_URL (default http://localhost:3000) and a database at DATABASE_URL with pgvector 0.7 or
newer (Debian 13: apt-get install postgresql-17-pgvector). Install: pip install httpx "psycopg[binary]" pgvector
pyarrow.
"""

import base64
import os
import pathlib
import sys
from collections.abc import Iterator

import httpx
import numpy as np
import psycopg
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pgvector.psycopg import register_vector

URL = os.environ.get("EMBEDDINGS_URL", "http://localhost:3000")
INSTRUCTION = "Retrieve images or text relevant to the user's query."
SMALL = 64  # the first values of a vector are a shorter vector; <=>, the cosine distance, needs no unit length


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


def connect(url: str) -> psycopg.Connection:
    """Connect, with support for vector columns."""
    connection = psycopg.connect(url, autocommit=True)
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    return connection


def index(connection: psycopg.Connection, folder: pathlib.Path) -> None:
    """Store the full vectors; index their first values (pgvector indexes at most 2000)."""
    connection.execute("DROP TABLE IF EXISTS pictures")
    connection.execute("CREATE TABLE pictures (name text PRIMARY KEY, embedding vector)")
    for names, vectors in read(folder):
        rows = list(zip(names, vectors, strict=True))
        connection.cursor().executemany("INSERT INTO pictures VALUES (%s, %s)", rows)
    small = f"(subvector(embedding, 1, {SMALL})::vector({SMALL}))"
    connection.execute(f"CREATE INDEX ON pictures USING hnsw ({small} vector_cosine_ops)")


def search(connection: psycopg.Connection, query: str, limit: int = 5) -> list[tuple[str, float]]:
    """Names and cosines. The short vectors select 20 * limit candidates; the full vectors rank them."""
    (vector,) = embed("/txt/embed", [query], instruction=INSTRUCTION)
    connection.execute(f"SET hnsw.ef_search = {20 * limit}")
    statement = f"""
        SELECT name, 1 - (embedding <=> %s) AS cosine FROM (
            SELECT * FROM pictures ORDER BY subvector(embedding, 1, {SMALL})::vector({SMALL}) <=> %s LIMIT %s
        ) AS first_stage ORDER BY cosine DESC LIMIT %s"""
    return connection.execute(statement, (vector, vector[:SMALL], 20 * limit, limit)).fetchall()


if __name__ == "__main__":
    with connect(os.environ["DATABASE_URL"]) as connection:
        index(connection, pathlib.Path(sys.argv[1]))
        for name, cosine in search(connection, sys.argv[2]):
            print(f"{cosine:.3f} {name}")
