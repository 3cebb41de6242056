"""The response of `/rerank`, `/v1/rerank` and `/v2/rerank`: the best document first."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from pydantic import BaseModel, Field

from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError
from embedder.http.dialects.dialect import Outcomes, ServedModel
from embedder.http.dialects.scoring import ScoringRequest, best_results, raise_first_error
from embedder.http.response import CUT_TEXTS, Usage, to_json, usage_fields

_META = {"meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}}  # Cohere's


class RerankError(BaseModel):
    """A document that has no score."""

    index: int
    code: str
    message: str


class RerankResult(BaseModel):
    """A document's place in the request, and its score."""

    index: int
    score: float | None = Field(None, description="The same as `relevance_score`; only on `/rerank`.")
    relevance_score: float = Field(description="From 0 to 1; the log-odds with `raw_scores`.")
    document: Any = Field(None, description="The document; absent without `return_documents`.")


class RerankResponse(BaseModel):
    """Response of `/rerank` and `/v2/rerank`: the best first."""

    id: str
    results: list[RerankResult]
    errors: list[RerankError] | None = Field(None, description="Documents that have no score, in order, if any.")
    model: str
    usage: Usage
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


class VoyageRerankResult(BaseModel):
    """A result as Voyage's clients read it."""

    index: int
    relevance_score: float
    document: str | None = Field(None, description="A document that is a text; absent without `return_documents`.")


class RerankV1Response(RerankResponse):
    """Response of `/v1/rerank`: the best first, twice, because Voyage's clients read `data` and others `results`."""

    object: Literal["list"]
    data: list[VoyageRerankResult]


def rerank_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/rerank`. If every document failed, raises the first error.

    Clients of vLLM and Infinity read `relevance_score`.
    """
    return to_json(_body(request, outcomes, model, "score", "relevance_score"))


def relevance_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/v2/rerank`. If every document failed, raises the first error."""
    return to_json({**_body(request, outcomes, model, "relevance_score"), **_META})


def v1_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/v1/rerank`. If every document failed, or one that must not, raises the error."""
    if request.fails_whole:
        raise_first_error(outcomes)
    body = _body(request, outcomes, model, "relevance_score")
    data = [_as_voyage_has_it(result, request) for result in body["results"]]
    return to_json({"object": "list", **body, "data": data, **_META})


def _as_voyage_has_it(result: dict[str, Any], request: ScoringRequest) -> dict[str, Any]:
    document = request.documents[result["index"]] if request.documents else None
    shown = {"document": document} if isinstance(document, str) else {}
    return {"index": result["index"], "relevance_score": result["relevance_score"], **shown}


def _body(request: ScoringRequest, outcomes: Outcomes, model: ServedModel, *names: str) -> dict[str, Any]:
    scored = {index: one for index, one in enumerate(outcomes) if isinstance(one, Embedding)}
    errors = [
        {"index": index, "code": one.code, "message": one.message}
        for index, one in enumerate(outcomes)
        if isinstance(one, EmbedderError)
    ]
    body = {
        "id": f"rerank-{uuid.uuid4()}",
        "results": best_results(request, outcomes, *names),
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
