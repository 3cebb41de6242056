"""vLLM's `POST /score`: one query and one or more documents, scored in order."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from embedder.engine.postprocess import Embedding
from embedder.errors import InvalidRequest
from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel
from embedder.http.dialects.scoring import (
    ScoringRequest,
    VllmScoringOptions,
    document_item,
    list_documents,
    query_item,
    raise_first_error,
    score_of,
)
from embedder.http.request_body import check_item_count, validate_body
from embedder.http.response import Usage, to_json, usage_fields
from embedder.settings import Settings


class ScoreRequest(VllmScoringOptions):
    """Body of `POST /score`: one query and one or more documents, in the format of vLLM's clients."""

    query: Any = Field(validation_alias=AliasChoices("queries", "data_1", "text_1", "query"))
    documents: Any = Field(validation_alias=AliasChoices("documents", "items", "data_2", "text_2"))
    instruction: str | None = Field(None, validation_alias=AliasChoices("instruction", "instruct"))


class ScoreResponse(BaseModel):
    """Response of `/score`, in the order of the documents."""

    id: str
    object: str
    model: str
    data: list[dict[str, Any]]
    usage: Usage


def parse_score(body: Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """Body of `/score` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(ScoreRequest, body)
    query = request.query
    if isinstance(query, list):
        if len(query) != 1:
            raise InvalidRequest(
                f"queries: got {len(query)}; allowed: one query with one or more documents. Send one request per query"
            )
        query = query[0]
    documents, _ = list_documents(request.documents)
    check_item_count(len(documents), settings)
    items = tuple(document_item(value, "end") for value in documents)
    return ScoringRequest(
        query_item(query, request.instruction, len(documents), None),
        items,
        raw_scores=request.use_activation is False,
    )


def score_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/score`, in the order of the documents. Raises the first error."""
    raise_first_error(outcomes)
    scored = {index: one for index, one in enumerate(outcomes) if isinstance(one, Embedding)}
    scores = [
        {"index": index, "object": "score", "score": score_of(one, raw=request.raw_scores)}
        for index, one in scored.items()
    ]
    head = {"id": f"score-{uuid.uuid4()}", "object": "list", "model": model.name}
    return to_json({**head, "data": scores, **usage_fields(scored, model.max_input_tokens)})


SCORE = Dialect(
    "/score",
    "Score documents against a query, in order, in the format of vLLM's clients",
    ScoreRequest,
    ScoreResponse,
    parse_score,
    score_response,
    examples={"texts": {"text_1": "red", "text_2": ["red", "blue"]}},
    fails_per_item=True,
    role="reranker",
)
