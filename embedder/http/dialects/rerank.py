"""The routes that rank documents: `/rerank`, `/v1/rerank` (Jina's, vLLM's and Voyage's) and `/v2/rerank` (Cohere's).

Query and documents are texts, or items as on `/embed`. On `/rerank`, a body with `texts` is TEI's (`tei_rerank`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import AliasChoices, Field, StrictBool, StrictInt

from embedder.http.dialects import tei_rerank
from embedder.http.dialects.dialect import Dialect
from embedder.http.dialects.rerank_response import (
    RerankResponse,
    RerankV1Response,
    relevance_response,
    rerank_response,
    v1_response,
)
from embedder.http.dialects.score import SCORE
from embedder.http.dialects.scoring import (
    ScoringRequest,
    VllmScoringOptions,
    document_item,
    list_documents,
    query_item,
)
from embedder.http.request_body import NonEmptyList, check_item_count, validate_body
from embedder.inputs.items import EXAMPLE_DATA_URI
from embedder.settings import Settings


class ScoringFields(VllmScoringOptions):
    """A query, its documents, and how to score them."""

    query: Any = Field(description="A text, or an item with text, image, video or content.")
    documents: Any = Field(description="A list of texts and items, one entry per document.")
    instruction: str | None = Field(
        None,
        validation_alias=AliasChoices("instruction", "instruct"),
        description="The task; default: the reference's for search queries.",
    )
    raw_scores: StrictBool = Field(False, description="Log-odds instead of probabilities.")
    max_tokens_per_doc: StrictInt | None = Field(None, ge=1, description="Tokens to which each document's text is cut.")
    truncate: StrictBool = Field(True, description="Whether text over the limit is cut; if not, it is an error.")


class RerankRequest(ScoringFields):
    """Body of `POST /rerank` and `/v2/rerank`."""

    top_n: StrictInt | None = Field(
        None, ge=0, validation_alias=AliasChoices("top_n", "top_k"), description="Results returned; 0 or absent: all."
    )
    return_documents: StrictBool = Field(False, description="Repeat each document in its result.")
    rank_fields: NonEmptyList[str] | None = Field(
        None, description="Cohere's: which fields of documents that are objects are read, as one text, in this order."
    )
    max_chunks_per_doc: StrictInt | None = Field(None, description="Cohere's. No effect: documents are not divided.")


class RerankV1Request(RerankRequest):
    """Body of `POST /v1/rerank`."""

    truncation: StrictBool | None = Field(
        None,
        description="Voyage's: the same as `truncate`. With this field, one document that fails makes the whole "
        "request fail, because Voyage's clients read no errors of documents.",
    )


def parse_v1(body: Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """Body of `/v1/rerank` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(RerankV1Request, body)
    if request.truncation is not None:
        request = request.model_copy(update={"truncate": request.truncate and request.truncation})
    return replace(_parse(request, settings), fails_whole=request.truncation is not None)


def parse_documents(body: Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """Body of `/rerank` and `/v2/rerank` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _parse(validate_body(RerankRequest, body), settings)


def _parse(request: RerankRequest, settings: Settings) -> ScoringRequest:
    parsed = parse_scoring(request, settings, request.rank_fields)
    documents = list_documents(request.documents)[0] if request.return_documents else ()
    return replace(parsed, documents=documents, top_n=request.top_n or None)


def parse_scoring(
    request: ScoringFields, settings: Settings, rank_fields: Sequence[str] | None = None
) -> ScoringRequest:
    """The query and the documents. Raises `InvalidRequest` and `RequestTooLarge`.

    `rank_fields`: fields of documents that are objects, of which only these are read.
    """
    documents, warnings = list_documents(request.documents)
    check_item_count(len(documents), settings)
    truncate = "end" if request.truncate else "none"
    return ScoringRequest(
        query_item(request.query, request.instruction, len(documents), request.max_tokens_per_doc),
        tuple(document_item(value, truncate, rank_fields) for value in documents),
        raw_scores=request.raw_scores or request.use_activation is False,
        warnings=warnings,
    )


_DOCUMENTS: list[Any] = ["a red square", {"image": EXAMPLE_DATA_URI}]


_PARTS = [{"type": "text", "text": "a swatch: "}, {"type": "image_url", "image_url": {"url": EXAMPLE_DATA_URI}}]


RERANK = Dialect(
    "/rerank",
    "Score documents against a query, the best first",
    RerankRequest,
    RerankResponse,
    parse_documents,
    rerank_response,
    examples={
        "texts and images": {"query": "red", "documents": _DOCUMENTS, "return_documents": True},
        "an image as the query": {"query": {"image": EXAMPLE_DATA_URI}, "documents": ["red", "blue"], "top_n": 1},
        "one bad document": {"query": "red", "documents": ["red", {"image": "not a picture"}]},
    },
    fails_per_item=True,
    role="reranker",
)


RERANK_V1 = Dialect(
    "/v1/rerank",
    "Score documents against a query, in the format of Jina's, vLLM's and Voyage's clients",
    RerankV1Request,
    RerankV1Response,
    parse_v1,
    v1_response,
    examples={
        "texts": {"model": "any", "query": "red", "documents": ["red", "blue"], "top_n": 1},
        "parts": {"query": {"content": _PARTS}, "documents": [{"content": _PARTS}, "blue"]},
        "Voyage: texts": {"model": "any", "query": "red", "documents": ["red", "blue"], "top_k": 1, "truncation": True},
    },
    fails_per_item=True,
    role="reranker",
)


RERANK_V2 = Dialect(
    "/v2/rerank",
    "Score documents against a query, in the format of Cohere's clients",
    RerankRequest,
    RerankResponse,
    parse_documents,
    relevance_response,
    examples={"texts": {"model": "any", "query": "red", "documents": ["red", "blue"], "max_tokens_per_doc": 4096}},
    fails_per_item=True,
    role="reranker",
)


RERANKING: tuple[Dialect[Any], ...] = (*tei_rerank.SHARED, RERANK, RERANK_V1, RERANK_V2, SCORE)
