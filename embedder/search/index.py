"""A collection for many searches: ids and the first values of all vectors in memory, the rest on the disk.

A search has two stages. The vectors are Matryoshka embeddings: their first values are an embedding too, so comparing
those finds the candidates. Only the candidates' whole vectors are then read, and give the order. With 256 values, a
million rows take 1 GB of memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedder.bulk.pages import split_page
from embedder.search.collection import Collection, Hit, cosines

FIRST_VALUES = 256  # of each vector that are in memory
MIN_CANDIDATES, CANDIDATES_PER_RESULT = 100, 4


class Index:
    """Searches a collection many times. `ids`: ids of all rows that have a vector, by row number."""

    def __init__(self, collection: Collection, first_values: int = FIRST_VALUES) -> None:
        self._collection = collection
        self.ids: list[str] = []
        first = [np.empty((0, min(first_values, collection.num_values)), np.float32)]
        for ids, vectors in collection.batches():
            self.ids += ids
            first.append(vectors[:, :first_values].copy())
        self._first: NDArray[np.float32] = np.concatenate(first)
        self._places = collection.places

    def search(self, query: NDArray[np.float32], limit: int) -> list[Hit]:
        """The `limit` rows of the largest cosine to `query`, the best first, among the candidates of the first stage.

        The query may have fewer values than the vectors; then only those are compared.
        """
        scores = cosines(self._first, query[: self._first.shape[1]])
        num_candidates = min(len(scores), max(MIN_CANDIDATES, CANDIDATES_PER_RESULT * limit))
        candidates = np.argsort(-scores, kind="stable")[:num_candidates]
        hits = self._hits(sorted(candidates.tolist()), query)
        return sorted(hits, key=lambda hit: (-hit.score, hit.row))[:limit]

    def first_rows(self, limit: int) -> list[Hit]:
        """The first rows of the collection, with a score of 0."""
        return self._hits(list(range(min(limit, len(self.ids)))), None)

    def row(self, number: int) -> Hit:
        """A row by its number, without score and text."""
        return Hit(number, self.ids[number], *split_page(self.ids[number]), 0.0, "")

    def thumbnail(self, row: int) -> bytes | None:
        """The thumbnail that the output has of a row; None if it has none."""
        return self._collection.thumbnail(int(self._places[row]))

    def _hits(self, rows: list[int], query: NDArray[np.float32] | None) -> list[Hit]:
        if not rows:
            return []
        ids, vectors, texts = self._collection.take([int(self._places[row]) for row in rows])
        scores = np.zeros(len(rows), np.float32) if query is None else cosines(vectors, query)
        found = zip(rows, ids, scores, texts, strict=True)
        return [Hit(row, row_id, *split_page(row_id), float(score), text) for row, row_id, score, text in found]
