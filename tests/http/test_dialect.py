"""Which dialect reads a body, where several share a path."""

from __future__ import annotations

from typing import Any

import pytest

from embedder.http.dialects import embed, rerank, tei
from embedder.http.dialects.dialect import Dialect, by_path, choose_dialect
from embedder.http.routes import DIALECTS


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"inputs": "red"}, tei.EMBED),
        ({"inputs": "red", "items": None}, tei.EMBED),
        ({"items": ["red"]}, embed.EMBED),
        ({"items": ["red"], "inputs": None}, embed.EMBED),  # null is not given
        ({}, embed.EMBED),
        ({"query": "red", "texts": ["red"]}, rerank.RERANK_TEI),
        ({"query": "red", "documents": ["red"], "texts": None}, rerank.RERANK),
    ],
)
def test_fields_of_the_body_decide(fields: dict[str, Any], expected: Dialect[Any]) -> None:
    sharing = by_path((*DIALECTS, *rerank.RERANKING))[expected.path]
    assert len(sharing) == 2
    assert choose_dialect(sharing, fields) is expected
