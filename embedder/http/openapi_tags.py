"""The groups of routes in the OpenAPI document, by whose clients use them."""

from __future__ import annotations

from typing import Any

from embedder.http.dialects import dashscope

_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {  # tag -> description, and the paths
    "Embed": ("Items of any kind, for your own programs.", ("/txt/embed", "/img/embed", "/embed")),
    "OpenAI": (
        "Clients of OpenAI, vLLM, LangChain and LlamaIndex.",
        ("/v1/embeddings", "/v1/models", "/v1/models/{id}", "/pooling"),
    ),
    "Rerank": (
        "Documents scored against a query, if the service has a reranker.",
        ("/rerank", "/v1/rerank", "/v2/rerank", "/score"),
    ),
    "Cohere": ("Clients of Cohere.", ("/v2/embed", "/v1/embed")),
    "TEI": ("Clients of text-embeddings-inference; also `POST /embed` with `inputs`.", ("/", "/similarity")),
    "Infinity": ("Clients of infinity.", ("/embeddings",)),
    "Voyage": ("Clients of Voyage.", ("/v1/multimodalembeddings",)),
    "Ollama": ("Clients of Ollama.", ("/api/embed", "/api/embeddings")),
    "DashScope": ("Clients of DashScope.", (dashscope.PATH,)),
    "KServe": ("The Open Inference Protocol.", ("/v2/models/{model}/infer",)),
    "Clouds": ("What SageMaker and Vertex AI send to a container.", ("/invocations", "/predict")),
    "BentoML": ("Clients of BentoML, with adaptive batching.", ("/embed_texts", "/embed_images", "/rerank_queries")),
    "Tokens": ("Tokens are counted before anything is sent.", ("/tokenize", "/detokenize", "/decode")),
    "Batches": (
        "OpenAI's batch jobs, if the operator allows them.",
        (
            *("/v1/files", "/v1/files/{id}", "/v1/files/{id}/content"),
            *("/v1/batches", "/v1/batches/{id}", "/v1/batches/{id}/cancel"),
        ),
    ),
    "Service": ("What is served, and whether it is ready.", ("/health", "/info")),
}
_TAG_OF = {path: tag for tag, (_, paths) in _GROUPS.items() for path in paths}
_METHODS = ("get", "post", "delete")


def tag_operations(paths: dict[str, Any]) -> list[dict[str, str]]:
    """Give each operation the tag of its path. Returns the document's list of tags, in the order of the groups."""
    for path, operations in paths.items():
        for method in operations.keys() & set(_METHODS):
            operations[method]["tags"] = [_TAG_OF[path]]
    used = {_TAG_OF[path] for path in paths}
    return [{"name": tag, "description": text} for tag, (text, _) in _GROUPS.items() if tag in used]
