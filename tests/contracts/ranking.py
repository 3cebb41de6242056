"""Rows of the table of contracts for a service with a reranker: clients that rank documents."""

from __future__ import annotations

import json
import os
import urllib.request

from tests.contracts.checks import SAME, check

QUERY = "a green car"
DOCUMENTS = ["A bee on a flower.", "The car is green.", "blue", "a house"]
ENVIRONMENT = "llama-index-rerank"


def expected(url: str, top_n: int) -> list[tuple[int, float]]:
    """Index and score of the best documents, by the service's own route."""
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS, "top_n": top_n}).encode()
    request = urllib.request.Request(f"{url}/rerank", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [(one["index"], one["score"]) for one in json.load(answer)["results"]]


def assert_ranked(found: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> None:
    assert [index for index, _ in found] == [index for index, _ in wanted]
    assert all(abs(one - other) <= SAME for (_, one), (_, other) in zip(found, wanted, strict=True))


@check(
    "Cohere",
    "LangChain's CohereRerank",
    source="langchain-cohere",
    needs="langchain_cohere",
    environment="langchain-cohere",
)
def langchain_cohere_rerank(url: str) -> None:
    from langchain_cohere import CohereRerank

    client = CohereRerank(model="any", cohere_api_key="none", base_url=url, top_n=3)  # type: ignore[arg-type]
    found = [(one["index"], one["relevance_score"]) for one in client.rerank(DOCUMENTS, QUERY)]
    assert_ranked(found, expected(url, 3))


@check(
    "TEI",
    "LlamaIndex' TextEmbeddingInference",
    source="llama-index-postprocessor-tei-rerank",
    needs="llama_index.postprocessor.tei_rerank",
    environment=ENVIRONMENT,
)
def llama_index_tei_rerank(url: str) -> None:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    assert_ranked(_ranked_nodes(TextEmbeddingInference(top_n=3, base_url=url)), expected(url, 3))


@check(
    "Jina",
    "LlamaIndex' JinaRerank",
    source="llama-index-postprocessor-jinaai-rerank",
    needs="llama_index.postprocessor.jinaai_rerank",
    environment=ENVIRONMENT,
)
def llama_index_jina_rerank(url: str) -> None:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    client = JinaRerank(top_n=3, model="any", base_url=f"{url}/v1", api_key="none")
    assert_ranked(_ranked_nodes(client), expected(url, 3))


@check("Voyage", "Client.rerank", source="voyageai (SDK)", needs="voyageai")
def voyage_rerank(url: str) -> None:
    import voyageai

    answer = voyageai.Client(api_key="none", base_url=f"{url}/v1").rerank(QUERY, DOCUMENTS, model="any", top_k=3)
    assert_ranked([(one.index, one.relevance_score) for one in answer.results], expected(url, 3))
    assert answer.total_tokens > 0


@check("TEI, vLLM, Voyage and Jina", "LiteLLM's rerank", source="litellm", needs="litellm")
def litellm_rerank(url: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    for provider in ("huggingface", "hosted_vllm", "voyage", "jina_ai"):
        answer = litellm.rerank(f"{provider}/any", QUERY, list(DOCUMENTS), top_n=3, api_base=url, api_key="none")
        assert_ranked([(one["index"], one["relevance_score"]) for one in answer.results], expected(url, 3))


def _ranked_nodes(client: object) -> list[tuple[int, float]]:
    """Index and score of each text that a LlamaIndex client returns, in its order."""
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in DOCUMENTS]
    ranked = client.postprocess_nodes(nodes, query_str=QUERY)  # type: ignore[attr-defined]
    return [(DOCUMENTS.index(one.node.get_content()), one.score) for one in ranked]
