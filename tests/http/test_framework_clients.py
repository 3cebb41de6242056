"""Frameworks that embed through OpenAI's protocol get the library's vectors: LangChain, LlamaIndex, mteb."""

from __future__ import annotations

import asyncio
from typing import Any

import mteb
import numpy as np
import pytest
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from mteb.models import OpenAIAPIEncodeWrapper

from benchmarks.quality.tasks import LocalRetrieval
from embedder import Embedder
from embedder.inputs.prompt import QUERY_INSTRUCTION
from tests.conftest import Server, picture
from tests.http.test_clients import TEXTS, assert_same

pytestmark = pytest.mark.slow


def test_langchain_gets_the_librarys_vectors(server: Server, embedder: Embedder) -> None:
    embeddings = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="any", check_embedding_ctx_length=False, dimensions=64
    )
    expected = embedder.embed(TEXTS, dimensions=64)
    assert_same(embeddings.embed_documents(TEXTS), expected)
    assert_same([embeddings.embed_query("red")], expected[:1])

    async def embed_all() -> list[list[float]]:
        try:
            return await embeddings.aembed_documents(TEXTS)
        finally:
            await embeddings.async_client._client.close()  # LangChain leaves it open

    assert_same(asyncio.run(embed_all()), expected)


def test_langchain_embeds_queries_with_the_query_instruction_if_configured(server: Server, embedder: Embedder) -> None:
    queries = OpenAIEmbeddings(
        base_url=f"{server.url}/v1",
        api_key="none",
        model="any",
        check_embedding_ctx_length=False,
        model_kwargs={"extra_body": {"input_type": "query"}},
    )
    assert_same([queries.embed_query("red")], embedder.embed(["red"], instruction=QUERY_INSTRUCTION))


def test_llama_index_gets_the_librarys_vectors(server: Server, embedder: Embedder) -> None:
    embeddings = OpenAILikeEmbedding(model_name="any", api_base=f"{server.url}/v1", api_key="none", dimensions=64)
    expected = embedder.embed(TEXTS, dimensions=64)
    assert_same(embeddings.get_text_embedding_batch(TEXTS), expected)
    assert_same([embeddings.get_query_embedding("red")], expected[:1])


@pytest.mark.parametrize("use_chat_template", [True, False])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_mteb_gets_the_librarys_vectors(kind: str, use_chat_template: bool, server: Server, embedder: Embedder) -> None:
    """Its client of OpenAI's protocol, in a retrieval task that it evaluates; `messages` or `input`."""
    documents = TEXTS if kind == "text" else [picture(40 + index, 60, index) for index in range(4)]
    category = "t2t" if kind == "text" else "t2i"
    task = LocalRetrieval("Tiny", category, {"text": TEXTS}, {kind: documents}, np.eye(4, dtype=bool), "Find it.", None)
    vectors = []

    class Recorded(OpenAIAPIEncodeWrapper):
        def encode(self, *arguments: Any, **options: Any) -> Any:
            vectors.append(super().encode(*arguments, **options))
            return vectors[-1]

    client = Recorded(server.url, embedder.checkpoint.name, use_chat_template=use_chat_template)
    assert client.max_length == 8192
    (result,) = mteb.evaluate(client, task, cache=None, co2_tracker=False).task_results
    assert_same(np.concatenate(vectors), embedder.embed([*TEXTS, *documents]))
    if kind == "text":
        assert result.get_score() == 1.0
