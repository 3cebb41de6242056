"""The rows of BentoML's adaptive-batching APIs: items to embed, and queries with documents to rank."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from embedder.errors import AttributedToItem, EmbedderError, InvalidRequest, without_traceback
from embedder.http.dialects.dialect import Outcomes
from embedder.http.dialects.rerank import ScoringFields, parse_scoring
from embedder.http.dialects.scoring import ScoringRequest, score_of
from embedder.http.request_body import check_item_count, validate_body
from embedder.http.response import to_json
from embedder.inputs.items import EmbeddingItem, describe_value, item_from_fields
from embedder.settings import Settings


def row_items(rows: Sequence[Any]) -> list[EmbeddingItem | EmbedderError]:
    """The item of each row, or what is wrong with it."""
    return list(map(_item, rows))


def _item(row: Any) -> EmbeddingItem | EmbedderError:
    try:
        return item_from_fields(row)
    except EmbedderError as error:
        return without_traceback(error)


def row_queries(rows: Sequence[Any], settings: Settings) -> list[ScoringRequest]:
    """The query and the documents of each row. Raises `InvalidRequest`, and `RequestTooLarge` if all rows together have
    too many documents.
    """
    requests = []
    for index, row in enumerate(rows):
        with AttributedToItem(index):
            if not isinstance(row, Mapping):
                raise InvalidRequest(f"got {describe_value(row)}; allowed: an object with query and documents")
            requests.append(parse_scoring(validate_body(ScoringFields, row), settings))
    check_item_count(sum(len(one.items) for one in requests), settings)
    return requests


async def score_rows(
    requests: Sequence[ScoringRequest], score: Callable[[ScoringRequest], Awaitable[Outcomes]]
) -> list[Outcomes]:
    """Score the rows at the same time. If a row fails as a whole, the others are cancelled, and its error is raised."""

    async def score_row(index: int, one: ScoringRequest) -> Outcomes:
        with AttributedToItem(index):
            return await score(one)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(score_row(index, one)) for index, one in enumerate(requests)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def scores_response(requests: Sequence[ScoringRequest], outcomes: Sequence[Outcomes]) -> bytes:
    """A list of scores for each row, in the order of its documents. Raises the error of the first that failed."""
    rows = []
    for index, (request, of_row) in enumerate(zip(requests, outcomes, strict=True)):
        scores = []
        for place, one in enumerate(of_row):
            if isinstance(one, EmbedderError):
                one.item = index
                one.message = f"document {place}: {one.message}"
                raise one
            scores.append(score_of(one, raw=request.raw_scores))
        rows.append(scores)
    return to_json(rows)
