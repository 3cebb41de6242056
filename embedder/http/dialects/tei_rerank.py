"""The body of text-embeddings-inference's clients on `POST /rerank`, `/` and `/invocations`: one with `texts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field, RootModel, StrictBool, StrictInt

from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel
from embedder.http.dialects.scoring import ScoringRequest, best_results, document_item, query_item, raise_first_error
from embedder.http.error_forms import PLAIN
from embedder.http.request_body import NonEmptyList, RequestBody, check_item_count, validate_body
from embedder.http.response import to_json
from embedder.settings import Settings


class TEIRerankRequest(RequestBody):
    """Body of `POST /rerank` in the format of text-embeddings-inference's clients."""

    query: str
    texts: NonEmptyList[str]
    raw_scores: StrictBool = False
    return_text: StrictBool = False
    truncate: StrictBool = False
    truncation_direction: str = Field("Right", pattern="(?i)^(right|left)$")
    top_n: StrictInt | None = Field(None, ge=0, description="LiteLLM's: results returned; 0 or absent: all.")


class TEIRerankResult(BaseModel):
    """A text's place in the request, and its score."""

    index: int
    score: float
    text: str | None = Field(None, description="The text; absent without `return_text`.")


class TEIRerankResponse(RootModel[list[TEIRerankResult]]):
    """Response of `/rerank` to the clients of text-embeddings-inference: the best first."""


def parse_tei(body: Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """TEI's body of `/rerank` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(TEIRerankRequest, body)
    check_item_count(len(request.texts), settings)
    cut = "start" if request.truncation_direction.lower() == "left" else "end"
    truncate = cut if request.truncate else "none"
    return ScoringRequest(
        query_item({"text": request.query}, None, len(request.texts), None),
        tuple(document_item({"text": text}, truncate) for text in request.texts),
        request.texts if request.return_text else (),
        top_n=request.top_n or None,
        raw_scores=request.raw_scores,
    )


def tei_response(request: ScoringRequest, outcomes: Outcomes, _: ServedModel) -> bytes:
    """Outcomes -> TEI's response body of `/rerank`. Raises the error of the first text that failed."""
    raise_first_error(outcomes)
    results = best_results(request, outcomes, "score")
    for result in results:
        if document := result.pop("document", None):
            result["text"] = document["text"]
    return to_json(results)


RERANK_TEI = Dialect(
    "/rerank",
    "Score texts against a query, in the format of TEI's clients (a body with `texts`)",
    TEIRerankRequest,
    TEIRerankResponse,
    parse_tei,
    tei_response,
    examples={"TEI: texts": {"query": "red", "texts": ["red", "blue"], "return_text": True}},
    errors=PLAIN,
    fails_per_item=True,
    given="texts",
    role="reranker",
)
SHARED = tuple(replace(RERANK_TEI, path=path) for path in ("/rerank", "/", "/invocations"))
