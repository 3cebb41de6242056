"""The routes that rank documents: `/rerank`, and `/v1/rerank` and `/v2/rerank` of Cohere's, Jina's and vLLM's clients.

Query and documents are texts, or items as on `/embed`. On `/rerank`, a body with `texts` is TEI's (`tei_rerank`).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, StrictBool, StrictInt

from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError
from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel
from embedder.http.dialects.score import SCORE
from embedder.http.dialects.scoring import (
    ScoringRequest,
    TruncateOption,
    best_results,
    document_item,
    list_documents,
    query_item,
)
from embedder.http.dialects.tei_rerank import RERANK_TEI
from embedder.http.request_body import check_item_count, validate_body
from embedder.http.response import CUT_TEXTS, Usage, to_json, usage_fields
from embedder.inputs.items import EXAMPLE_DATA_URI
from embedder.settings import Settings


class ScoringFields(TruncateOption):
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
    """Body of `POST /rerank`, `/v1/rerank` and `/v2/rerank`."""

    top_n: StrictInt | None = Field(
        None, ge=0, validation_alias=AliasChoices("top_n", "top_k"), description="Results returned; 0 or absent: all."
    )
    return_documents: StrictBool = Field(False, description="Repeat each document in its result.")


class RerankError(BaseModel):
    """A document that has no score."""

    index: int
    code: str
    message: str


class RerankResult(BaseModel):
    """A document's place in the request, and its score; `relevance_score` on `/v1/rerank` and `/v2/rerank`."""

    index: int
    score: float | None = Field(None, description="From 0 to 1; the log-odds with `raw_scores`.")
    relevance_score: float | None = None
    document: Any = Field(None, description="The document; absent without `return_documents`.")


class RerankResponse(BaseModel):
    """Response of `/rerank`, `/v1/rerank` and `/v2/rerank`: the best first."""

    results: list[RerankResult]
    errors: list[RerankError] | None = Field(None, description="Documents that have no score, in order, if any.")
    model: str
    usage: Usage
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


def parse_documents(body: bytes | Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """Body of `/rerank`, `/v1/rerank` and `/v2/rerank` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(RerankRequest, body)
    parsed = parse_scoring(request, settings)
    documents = list_documents(request.documents)[0] if request.return_documents else ()
    return replace(parsed, documents=documents, top_n=request.top_n or None)


def parse_scoring(request: ScoringFields, settings: Settings) -> ScoringRequest:
    """The query and the documents. Raises `InvalidRequest` and `RequestTooLarge`."""
    documents, warnings = list_documents(request.documents)
    check_item_count(len(documents), settings)
    truncate = "end" if request.truncate else "none"
    return ScoringRequest(
        query_item(request.query, request.instruction, len(documents), request.max_tokens_per_doc),
        tuple(document_item(value, truncate) for value in documents),
        raw_scores=request.raw_scores,
        warnings=warnings,
    )


def rerank_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/rerank`. If every document failed, raises the first error."""
    return to_json(_body(request, outcomes, model, "score"))


def relevance_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/v1/rerank` and `/v2/rerank`. If every document failed, raises the first error."""
    body = _body(request, outcomes, model, "relevance_score")
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return to_json({"id": f"rerank-{uuid.uuid4()}", **body, "meta": meta})


def _body(request: ScoringRequest, outcomes: Outcomes, model: ServedModel, name: str) -> dict[str, Any]:
    scored = {index: one for index, one in enumerate(outcomes) if isinstance(one, Embedding)}
    errors = [
        {"index": index, "code": one.code, "message": one.message}
        for index, one in enumerate(outcomes)
        if isinstance(one, EmbedderError)
    ]
    body = {
        "results": best_results(request, outcomes, name),
        **({"errors": errors} if errors else {}),
        "model": model.name,
        **usage_fields(scored, model.max_input_tokens),
    }
    if warnings := [*request.warnings, *body.get("warnings", ())]:
        body["warnings"] = warnings
    first = outcomes[0]
    if not scored and isinstance(first, EmbedderError):
        first.details = body
        raise first
    return body


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
)


RERANK_V1 = Dialect(
    "/v1/rerank",
    "Score documents against a query, in the format of Jina's and vLLM's clients",
    RerankRequest,
    RerankResponse,
    parse_documents,
    relevance_response,
    examples={
        "texts": {"model": "any", "query": "red", "documents": ["red", "blue"], "top_n": 1},
        "parts": {"query": {"content": _PARTS}, "documents": [{"content": _PARTS}, "blue"]},
    },
    fails_per_item=True,
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
)


RERANKING: tuple[Dialect[Any], ...] = (RERANK_TEI, RERANK, RERANK_V1, RERANK_V2, SCORE)
