"""Words that clients choose from a list may be in any letter case, on every route and at every depth."""

from __future__ import annotations

from typing import Any

import pytest

from embedder.http.dialects import cohere, dashscope, embed, kserve, openai, pooling, rerank, tei, tei_rerank, voyage
from embedder.http.dialects.dialect import Dialect
from embedder.inputs.items import EXAMPLE_DATA_URI
from embedder.settings import Settings

URL = {"url": EXAMPLE_DATA_URI}
CASES: list[tuple[Dialect[Any], dict[str, Any], dict[str, Any]]] = [
    (openai.EMBEDDINGS, {"input": "a"}, {"modality": "TEXT"}),
    (openai.EMBEDDINGS, {"input": ["a", EXAMPLE_DATA_URI]}, {"modality": ["Text", "IMAGE"]}),
    (openai.EMBEDDINGS, {"input": "a"}, {"encoding_format": "FLOAT", "truncate": "End", "input_type": "PASSAGE"}),
    (openai.EMBEDDINGS, {}, {"messages": [{"role": "USER", "content": "a"}]}),
    (openai.EMBEDDINGS, {}, {"messages": [{"role": "user", "content": [{"type": "TEXT", "text": "a"}]}]}),
    (openai.EMBEDDINGS, {}, {"input": {"type": "Image_URL", "image_url": URL}}),
    (embed.EMBED, {}, {"items": [{"content": [{"type": "TEXT", "text": "a"}]}]}),
    (embed.EMBED, {}, {"items": [{"text": "a", "truncate": "START"}], "output_dtype": "INT8"}),
    (pooling.POOLING, {"input": "a"}, {"task": "EMBED"}),
    (tei.EMBED, {"inputs": "a"}, {"prompt_name": "QUERY", "truncation_direction": "LEFT", "truncate": True}),
    (cohere.EMBED, {"texts": ["a"]}, {"input_type": "SEARCH_QUERY", "embedding_types": ["INT8"], "truncate": "none"}),
    (voyage.MULTIMODAL, {"inputs": [{"content": [{"type": "TEXT", "text": "a"}]}]}, {"input_type": "QUERY"}),
    (kserve.INFER, {}, {"inputs": [{"name": "TEXT", "shape": [1], "datatype": "bytes", "data": ["a"]}]}),
    (rerank.RERANK, {"query": "a"}, {"documents": [{"content": [{"type": "TEXT", "text": "b"}]}]}),
    (tei_rerank.RERANK_TEI, {"query": "a", "texts": ["b"]}, {"truncation_direction": "LEFT", "truncate": True}),
    (dashscope.MULTIMODAL, {"input": {"contents": [{"text": "a"}]}}, {"parameters": {"output_type": "DENSE"}}),
]


def swapped(value: Any) -> Any:
    """The value with all its words in the other letter case, but texts and data URIs."""
    match value:
        case dict():
            return {name: one if name == "url" else swapped(one) for name, one in value.items()}
        case list():
            return [swapped(one) for one in value]
        case str() if len(value) > 1 and not value.startswith("data:"):
            return value.swapcase()
    return value


@pytest.mark.parametrize(("dialect", "body", "words"), CASES, ids=lambda value: getattr(value, "path", "")[:20] or "_")
def test_letter_case_of_option_words_makes_no_difference(
    dialect: Dialect[Any], body: dict[str, Any], words: dict[str, Any]
) -> None:
    parsed = dialect.parse({**body, **words}, Settings())
    assert dialect.parse({**body, **swapped(words)}, Settings()) == parsed
