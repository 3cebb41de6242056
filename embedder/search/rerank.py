"""The best results of a search, judged again by a reranker, for a program that searches once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from embedder.errors import EmbedderError
from embedder.reranker import Reranker
from embedder.search.collection import Collection, Hit
from embedder.search.documents import Documents
from embedder.settings import Settings

DOCUMENTS_AT_ONCE = 24  # in memory; a page of 1.3 megapixels takes 4 MB


def rerank(query: Mapping[str, Any], hits: Sequence[Hit], collection: Collection, settings: Settings) -> list[Hit]:
    """The hits by the score of the reranker, the best first. Those that cannot be read anymore are the last ones.

    Raises `ValueError`, and the `EmbedderError` of the query or of the reranker's checkpoint.
    """
    with Reranker(settings=settings) as reranker:
        loaded = reranker.models.reranker
        assert loaded is not None
        judged: list[Hit] = []
        with contextlib.closing(Documents(collection, settings, loaded.preprocessor.vision.regime)) as documents:
            for start in range(0, len(hits), DOCUMENTS_AT_ONCE):
                some = hits[start : start + DOCUMENTS_AT_ONCE]
                items = documents.read(some)
                scores = reranker.score(query, items, errors="return")
                judged += [replace(hit, reranked=score) for hit, score in zip(some, scores, strict=True)]
    return sorted(judged, key=_order)  # of equal ones, the most similar


def _order(hit: Hit) -> float:
    return 1.0 if hit.reranked is None or isinstance(hit.reranked, EmbedderError) else -hit.reranked
