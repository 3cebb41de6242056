"""Which dialect reads a body, where several share a path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from embedder.http.dialects import embed, openai, rerank, tei, tei_rerank
from embedder.http.dialects.dialect import Dialect, by_path, choose_dialect
from embedder.http.routes import DIALECTS


def on(path: str, dialect: Dialect[Any]) -> Dialect[Any]:
    return replace(dialect, path=path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"inputs": "red"}, tei.EMBED),
        ({"inputs": "red", "items": None}, tei.EMBED),
        ({"inputs": {"source_sentence": "red"}}, on("/embed", tei.SIMILARITY)),
        ({"inputs": {"source_sentence": None}}, tei.EMBED),
        ({"items": ["red"]}, embed.EMBED),
        ({"items": ["red"], "inputs": None}, embed.EMBED),  # null is not given
        ({}, embed.EMBED),
        ({"query": "red", "texts": ["red"]}, tei_rerank.RERANK_TEI),
        ({"query": "red", "documents": ["red"], "texts": None}, rerank.RERANK),
        ({}, on("/", tei.EMBED)),
        ({"inputs": {"source_sentence": "red"}}, on("/", tei.SIMILARITY)),
        ({"query": "red", "texts": ["red"]}, on("/", tei_rerank.RERANK_TEI)),
        ({"inputs": "red"}, on("/invocations", tei.EMBED)),
        ({"inputs": {"source_sentence": "red"}}, on("/invocations", tei.SIMILARITY)),
        ({"input": "red"}, openai.INVOCATIONS),
        ({}, openai.INVOCATIONS),
    ],
)
def test_fields_of_the_body_decide(fields: dict[str, Any], expected: Dialect[Any]) -> None:
    sharing = by_path((*rerank.RERANKING, *DIALECTS))[expected.path]
    assert len(sharing) > 1
    assert choose_dialect(sharing, fields) == expected
