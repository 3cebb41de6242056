"""The routes that score documents against a query: `/rerank`, `/v1/rerank`, `/v2/rerank` and `/score`.

`/rerank` takes this service's own form, or TEI's if the body has `texts`. `/v1/rerank` and `/v2/rerank` are those of
Cohere's, Jina's and vLLM's clients, `/score` is vLLM's. Query and documents are texts, or items as on `/embed`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, RootModel, StrictBool, StrictInt

from embedder.engine.postprocess import Embedding
from embedder.engine.ranking import best_first, sigmoid
from embedder.errors import ITEM_ERRORS, EmbedderError, InvalidRequest, attributed_to_query, without_traceback
from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel
from embedder.http.dialects.messages import item_from_string, parts_from_content
from embedder.http.request_body import NonEmptyList, RequestBody, check_item_count, validate_body
from embedder.http.response import CUT_TEXTS, Usage, to_json, usage_fields
from embedder.inputs.items import EXAMPLE_DATA_URI, EmbeddingItem, describe_value, item_from_fields, without_nulls
from embedder.inputs.pairs import Query, part_of_pair
from embedder.settings import Settings


class RerankRequest(RequestBody):
    """Body of `POST /rerank`, `/v1/rerank` and `/v2/rerank`."""

    query: Any = Field(description="A text, or an item with text, image, video or content.")
    documents: Any = Field(description="A list of texts and items, one entry per document.")
    instruction: str | None = Field(
        None,
        validation_alias=AliasChoices("instruction", "instruct"),
        description="The task; default: the reference's for search queries.",
    )
    top_n: StrictInt | None = Field(
        None, ge=0, validation_alias=AliasChoices("top_n", "top_k"), description="Results returned; 0 or absent: all."
    )
    return_documents: StrictBool = Field(False, description="Repeat each document in its result.")
    raw_scores: StrictBool = Field(False, description="Log-odds instead of probabilities.")
    max_tokens_per_doc: StrictInt | None = Field(None, ge=1, description="Tokens to which each document's text is cut.")
    truncate: StrictBool = Field(True, description="Whether text over the limit is cut; if not, it is an error.")


class TEIRerankRequest(RequestBody):
    """Body of `POST /rerank` in the format of text-embeddings-inference's clients."""

    query: str
    texts: NonEmptyList[str]
    raw_scores: StrictBool = False
    return_text: StrictBool = False
    truncate: StrictBool = False
    truncation_direction: str = Field("Right", pattern="(?i)^(right|left)$")


class ScoreRequest(RequestBody):
    """Body of `POST /score`: one query and one or more documents, in the format of vLLM's clients."""

    query: Any = Field(validation_alias=AliasChoices("queries", "data_1", "text_1", "query"))
    documents: Any = Field(validation_alias=AliasChoices("documents", "items", "data_2", "text_2"))
    instruction: str | None = Field(None, validation_alias=AliasChoices("instruction", "instruct"))


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


class TEIRerankResult(BaseModel):
    """A text's place in the request, and its score."""

    index: int
    score: float
    text: str | None = Field(None, description="The text; absent without `return_text`.")


class TEIRerankResponse(RootModel[list[TEIRerankResult]]):
    """Response of `/rerank` to the clients of text-embeddings-inference: the best first."""


class ScoreResponse(BaseModel):
    """Response of `/score`, in the order of the documents."""

    id: str
    object: str
    model: str
    data: list[dict[str, Any]]
    usage: Usage


@dataclass(frozen=True)
class ScoringRequest:
    """A body as a query and its documents (`items`), or the errors they caused, and how to write the response."""

    query: Query
    items: tuple[EmbeddingItem | EmbedderError, ...]
    documents: Sequence[Any] = ()  # as they were sent, if the response repeats them
    top_n: int | None = None
    raw_scores: bool = False
    warnings: tuple[str, ...] = ()


def parse_documents(body: bytes | Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """Body of `/rerank`, `/v1/rerank` and `/v2/rerank` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(RerankRequest, body)
    documents, warnings = _list_documents(request.documents)
    check_item_count(len(documents), settings)
    truncate = "end" if request.truncate else "none"
    return ScoringRequest(
        _query(request.query, request.instruction, len(documents), request.max_tokens_per_doc),
        tuple(_document(value, truncate) for value in documents),
        documents if request.return_documents else (),
        request.top_n or None,
        request.raw_scores,
        warnings=warnings,
    )


def parse_tei(body: bytes | Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """TEI's body of `/rerank` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(TEIRerankRequest, body)
    check_item_count(len(request.texts), settings)
    cut = "start" if request.truncation_direction.lower() == "left" else "end"
    truncate = cut if request.truncate else "none"
    return ScoringRequest(
        _query({"text": request.query}, None, len(request.texts), None),
        tuple(_document({"text": text}, truncate) for text in request.texts),
        request.texts if request.return_text else (),
        raw_scores=request.raw_scores,
    )


def parse_score(body: bytes | Mapping[str, Any], settings: Settings) -> ScoringRequest:
    """Body of `/score` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(ScoreRequest, body)
    query = request.query
    if isinstance(query, list):
        if len(query) != 1:
            raise InvalidRequest(
                f"queries: got {len(query)}; allowed: one query with one or more documents. Send one request per query"
            )
        query = query[0]
    documents, _ = _list_documents(request.documents)
    check_item_count(len(documents), settings)
    items = tuple(_document(value, "end") for value in documents)
    return ScoringRequest(_query(query, request.instruction, len(documents), None), items)


def rerank_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/rerank`. If every document failed, raises the first error."""
    return to_json(_body(request, outcomes, model, "score"))


def tei_response(request: ScoringRequest, outcomes: Outcomes, _: ServedModel) -> bytes:
    """Outcomes -> TEI's response body of `/rerank`. Raises the error of the first text that failed."""
    _raise_first_error(outcomes)
    results = _best_results(request, outcomes, "score")
    for result in results:
        if document := result.pop("document", None):
            result["text"] = document["text"]
    return to_json(results)


def relevance_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/v1/rerank` and `/v2/rerank`. If every document failed, raises the first error."""
    body = _body(request, outcomes, model, "relevance_score")
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return to_json({"id": f"rerank-{uuid.uuid4()}", **body, "meta": meta})


def score_response(request: ScoringRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body of `/score`, in the order of the documents. Raises the first error."""
    _raise_first_error(outcomes)
    scored = {index: one for index, one in enumerate(outcomes) if isinstance(one, Embedding)}
    scores = [{"index": index, "object": "score", "score": _score(one, raw=False)} for index, one in scored.items()]
    head = {"id": f"score-{uuid.uuid4()}", "object": "list", "model": model.name}
    return to_json({**head, "data": scores, **usage_fields(scored, model.max_input_tokens)})


def _body(request: ScoringRequest, outcomes: Outcomes, model: ServedModel, name: str) -> dict[str, Any]:
    scored = {index: one for index, one in enumerate(outcomes) if isinstance(one, Embedding)}
    errors = [
        {"index": index, "code": one.code, "message": one.message}
        for index, one in enumerate(outcomes)
        if isinstance(one, EmbedderError)
    ]
    body = {
        "results": _best_results(request, outcomes, name),
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


def _raise_first_error(outcomes: Outcomes) -> None:
    """Raise the error of the first document that failed, with its index."""
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, EmbedderError):
            outcome.item = index
            raise outcome


def _best_results(request: ScoringRequest, outcomes: Outcomes, name: str) -> list[dict[str, Any]]:
    """The scored documents, the best first, at most `top_n`."""
    scored = [(index, one) for index, one in enumerate(outcomes) if isinstance(one, Embedding)]
    scores = [_score(one, raw=request.raw_scores) for _, one in scored]
    results = []
    for place in best_first(scores)[: request.top_n]:
        index = scored[place][0]
        result: dict[str, Any] = {"index": index, name: scores[place]}
        if request.documents:
            document = request.documents[index]
            result["document"] = {"text": document} if isinstance(document, str) else document
        results.append(result)
    return results


def _score(outcome: Embedding, *, raw: bool) -> float:
    logit = float(outcome.vector[0])
    return logit if raw else sigmoid(logit)


def _list_documents(documents: Any) -> tuple[list[Any], tuple[str, ...]]:
    """The documents as a list, and a warning if a list of parts looks like several documents."""
    if isinstance(documents, Mapping) and isinstance(parts := documents.get("content"), list) and len(parts) > 1:
        raise InvalidRequest(
            f"documents: got one object with {len(parts)} parts in `content`, which are one document; allowed: a list "
            'with one entry per document, such as ["a text", {"content": [..]}]'
        )
    entries = documents if isinstance(documents, list) else [documents]
    if not entries:
        raise InvalidRequest("documents: got an empty list; allowed: at least one document")
    parts = entries[0].get("content") if len(entries) == 1 and isinstance(entries[0], Mapping) else None
    if isinstance(parts, list) and len(parts) > 1 and len({_type(part) for part in parts}) == 1:
        return entries, (
            f"the only document has {len(parts)} parts, which are judged together; to rank them, send each as an entry "
            "of `documents`",
        )
    return entries, ()


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _query(value: Any, instruction: str | None, num_documents: int, max_document_tokens: int | None) -> Query:
    """The query. Raises `InvalidRequest`, which says that it is the query's."""
    with attributed_to_query():
        item = _item(value)
        return Query(item.parts, instruction, num_documents=num_documents, max_document_tokens=max_document_tokens)


def _document(value: Any, truncate: str) -> EmbeddingItem | EmbedderError:
    """The document, or what is wrong with it."""
    try:
        return _item(value, truncate)
    except ITEM_ERRORS as error:
        return without_traceback(error)


def _item(value: Any, truncate: str = "end") -> EmbeddingItem:
    """A text, a data URI, an item, a part, or a list of parts in any client's format -> item."""
    match value:
        case str():
            fields = item_from_string(value)
        case list():
            fields = {"content": parts_from_content(value)}
        case Mapping() if "type" in value:
            fields = {"content": parts_from_content([value])}
        case Mapping() if value.get("content") is not None:
            fields = {**value, "content": parts_from_content(value["content"])}
        case Mapping():
            fields = dict(value)
        case _:
            raise InvalidRequest(
                f"got {describe_value(value)}; allowed: a text, or an object with text, image, video or content"
            )
    return part_of_pair(item_from_fields({"truncate": truncate, **without_nulls(fields)}))


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
RERANK_TEI = Dialect(
    "/rerank",
    "Score texts against a query, in the format of TEI's clients (a body with `texts`)",
    TEIRerankRequest,
    TEIRerankResponse,
    parse_tei,
    tei_response,
    examples={"TEI: texts": {"query": "red", "texts": ["red", "blue"], "return_text": True}},
    fails_per_item=True,
    given="texts",
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
SCORE = Dialect(
    "/score",
    "Score documents against a query, in order, in the format of vLLM's clients",
    ScoreRequest,
    ScoreResponse,
    parse_score,
    score_response,
    examples={"texts": {"text_1": "red", "text_2": ["red", "blue"]}},
    fails_per_item=True,
)
RERANKING: tuple[Dialect[Any], ...] = (RERANK_TEI, RERANK, RERANK_V1, RERANK_V2, SCORE)
