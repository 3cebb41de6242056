"""The response of `/rerank`, `/v1/rerank` and `/v2/rerank`: the best document first."""

from __future__ import annotations

import uuid
from typing import Any

from pydantic import BaseModel, Field

from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError
from embedder.http.dialects.dialect import Outcomes, ServedModel
from embedder.http.dialects.scoring import ScoringRequest, best_results
from embedder.http.response import CUT_TEXTS, Usage, to_json, usage_fields


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
