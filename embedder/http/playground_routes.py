"""The routes of the playground: its files, the collection that it searches, and reranking of what it has found."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from pydantic import Field, StrictInt
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError, NotFound
from embedder.http.body_reader import BodyReader
from embedder.http.dialects.dialect import Outcomes
from embedder.http.dialects.scoring import ScoringRequest, query_item, score_of
from embedder.http.disconnect import unless_disconnected
from embedder.http.request_body import RequestBody, read_json, validate_body
from embedder.http.response import json_response, to_json
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.pairs import Query
from embedder.playground.collection import HEADERS, PAGE, Collection, page_file

OPEN_PATHS = frozenset({"/playground", "/playground/", *(f"/playground/{name}" for name in PAGE)})  # need no key
MAX_RERANKED = 24  # as the page says

ReadRows = Callable[[Sequence[int]], Sequence[EmbeddingItem | EmbedderError]]
Score = Callable[[ScoringRequest], Awaitable[Outcomes]]


class RerankFound(RequestBody):
    """Body of `POST /playground/rerank`."""

    query: Any = Field(description="A text, or an item with an image.")
    instruction: str | None = Field(None, description="The task; default: the reranker's.")
    rows: list[StrictInt] = Field(
        min_length=1, max_length=MAX_RERANKED, description="Rows of the collection, by number."
    )


async def rerank_found(request: Request, bodies: BodyReader, read_rows: ReadRows, score: Score) -> Response:
    """Score rows of a collection. `read_rows` gives their documents, or raises `NotFound` if there are no such rows.

    The response has an entry for each row, in order: its score, or its error.
    """
    body = (await request.receive())["body"]
    rows, query = await bodies.run(body, partial(_read, body))
    documents = await asyncio.to_thread(read_rows, rows)
    outcomes = await unless_disconnected(score(ScoringRequest(query, tuple(documents))), request.receive)
    results = [{"row": row, **_fields(outcome)} for row, outcome in zip(rows, outcomes, strict=True)]
    return json_response(to_json({"results": results}), HEADERS)


def _read(body: bytes) -> tuple[list[int], Query]:
    """The rows, and the query. Raises `InvalidRequest`."""
    asked = validate_body(RerankFound, read_json(body))
    return asked.rows, query_item(asked.query, asked.instruction, len(asked.rows), None)


def _fields(outcome: Embedding | EmbedderError) -> dict[str, Any]:
    if isinstance(outcome, Embedding):
        return {"score": round(score_of(outcome, raw=False), 4)}
    return {"error": {"code": outcome.code, "message": outcome.message}}


class PlaygroundRoutes:
    """`routes`: for a router. `collection` returns what is searched, or raises `NotReady`. `scoring` returns what
    scores documents, or raises `NotFound`.
    """

    def __init__(self, bodies: BodyReader, collection: Callable[[], Collection], scoring: Callable[[], Score]) -> None:
        self._bodies = bodies
        self._collection_served = collection
        self._scoring = scoring
        self.routes = [
            Route("/playground/collection", self._collection, methods=["GET"]),
            Route("/playground/thumbnails/{index}", self._thumbnail, methods=["GET"]),
            Route("/playground/rerank", self._rerank, methods=["POST"]),
            Route("/playground", self._file, methods=["GET"]),
            Route("/playground/", self._without_slash, methods=["GET"]),
            Route("/playground/{name}", self._file, methods=["GET"]),
        ]

    async def _collection(self, _: Request) -> Response:
        collection = self._collection_served()
        body = await asyncio.to_thread(lambda: to_json(collection.fields()))  # up to 22 MB
        return json_response(body, HEADERS)

    async def _thumbnail(self, request: Request) -> Response:
        index = request.path_params["index"]
        is_number = index.isdecimal() and len(index) < 10  # a route of `int` would convert any number of digits
        picture = self._collection_served().thumbnail(int(index)) if is_number else None
        return _file_response((picture, "image/webp") if picture else None)

    async def _rerank(self, request: Request) -> Response:
        score = self._scoring()
        return await rerank_found(request, self._bodies, self._collection_served().documents, score)

    async def _without_slash(self, _: Request) -> Response:
        """The page's links are relative to its path. So is this one: a proxy may have another scheme and prefix."""
        return Response(status_code=307, headers={"location": "../playground"})

    async def _file(self, request: Request) -> Response:
        return _file_response(page_file(request.path_params.get("name", "index.html")))


def _file_response(file: tuple[bytes, str] | None) -> Response:
    if file is None:
        raise NotFound("the playground has no such file")
    return Response(file[0], headers={**HEADERS, "cache-control": "no-cache"}, media_type=file[1])
