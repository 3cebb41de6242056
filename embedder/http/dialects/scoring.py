"""What the routes that score documents have in common: a query and documents, as texts or items, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import AliasChoices, Field, StrictBool

from embedder.engine.postprocess import Embedding
from embedder.engine.ranking import best_first, sigmoid
from embedder.errors import ITEM_ERRORS, EmbedderError, InvalidRequest, attributed_to_query, without_traceback
from embedder.http.dialects.dialect import Outcomes
from embedder.http.dialects.messages import item_from_entry, parts_from_content
from embedder.http.request_body import RequestBody
from embedder.inputs.items import EmbeddingItem, describe_value, item_from_fields
from embedder.inputs.pairs import Query, part_of_pair


class VllmScoringOptions(RequestBody):
    """vLLM's options of the routes that rank and score."""

    use_activation: StrictBool | None = Field(
        None,
        validation_alias=AliasChoices("use_activation", "activation", "softmax"),
        description="False: log-odds instead of probabilities.",
    )
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None, description="Text over the service's limit is cut; to cut more, use `max_tokens_per_doc`."
    )


@dataclass(frozen=True)
class ScoringRequest:
    """A body as a query and its documents (`items`), or the errors they caused, and how to write the response."""

    query: Query
    items: tuple[EmbeddingItem | EmbedderError, ...]
    documents: Sequence[Any] = ()  # as they were sent, if the response repeats them
    top_n: int | None = None
    fails_whole: bool = False  # whether a document that fails fails the request
    raw_scores: bool = False
    warnings: tuple[str, ...] = ()


def list_documents(documents: Any) -> tuple[list[Any], tuple[str, ...]]:
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


def query_item(value: Any, instruction: str | None, num_documents: int, max_document_tokens: int | None) -> Query:
    """The query. Raises `InvalidRequest`, which says that it is the query's."""
    with attributed_to_query():
        item = _item(value)
        return Query(item.parts, instruction, num_documents=num_documents, max_document_tokens=max_document_tokens)


def document_item(value: Any, truncate: str, rank_fields: Sequence[str] | None = None) -> EmbeddingItem | EmbedderError:
    """The document, or what is wrong with it. With `rank_fields`, an object is read as the text of these fields."""
    try:
        if rank_fields and isinstance(value, Mapping):
            value = {"text": _text_of_fields(value, rank_fields)}
        return _item(value, truncate)
    except ITEM_ERRORS as error:
        return without_traceback(error)


def _text_of_fields(document: Mapping[str, Any], names: Sequence[str]) -> str:
    """The texts of the named fields in the order of `names`, one per line. Raises `InvalidRequest`."""
    found = {name: document[name] for name in names if document.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str):
            raise InvalidRequest(f"{name}: got {describe_value(value)}; allowed: a text, because rank_fields names it")
    if not found:
        raise InvalidRequest("got an object without the fields that rank_fields names; allowed: at least one of them")
    return "\n".join(found.values())


def _item(value: Any, truncate: str = "end") -> EmbeddingItem:
    """A text, a data URI, an item, a part, or a list of parts in any client's format -> item."""
    fields = {"content": parts_from_content(value)} if isinstance(value, list) else item_from_entry(value)
    return part_of_pair(item_from_fields({"truncate": truncate, **fields}))


def best_results(request: ScoringRequest, outcomes: Outcomes, *names: str) -> list[dict[str, Any]]:
    """The scored documents, the best first, at most `top_n`. `names`: what the field of the score is called."""
    scored = [(index, one) for index, one in enumerate(outcomes) if isinstance(one, Embedding)]
    scores = [score_of(one, raw=request.raw_scores) for _, one in scored]
    results = []
    for place in best_first(scores)[: request.top_n]:
        index = scored[place][0]
        result: dict[str, Any] = {"index": index, **dict.fromkeys(names, scores[place])}
        if request.documents:
            document = request.documents[index]
            result["document"] = {"text": document} if isinstance(document, str) else document
        results.append(result)
    return results


def score_of(outcome: Embedding, *, raw: bool) -> float:
    logit = float(outcome.vector[0])
    return logit if raw else sigmoid(logit)


def raise_first_error(outcomes: Outcomes) -> None:
    """Raise the error of the first document that failed, with its index."""
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, EmbedderError):
            outcome.item = index
            raise outcome
