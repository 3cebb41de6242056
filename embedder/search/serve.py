"""The playground on a collection, served by this process: `python -m embedder.search OUTPUT --serve`.

The routes of the service embed the query, and the routes here search the collection and show its pages. A row is named
by its number only, never by a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

import embedder
from embedder.bulk.pages import is_clip
from embedder.bulk.thumbnails import THUMBNAIL_PIXELS
from embedder.errors import EmbedderError, InvalidRequest, NotFound
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.dialects.dialect import ServedModel
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.http.playground_routes import OPEN_PATHS, rerank_found
from embedder.http.request_body import RequestBody, read_json, validate_body
from embedder.http.response import json_response, to_json
from embedder.http.routes import Routes, Serving, not_found
from embedder.inputs.data_uri import decode_base64
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.models import Models
from embedder.playground.collection import HEADERS
from embedder.playground.collection import Collection as Pictures
from embedder.search.collection import Collection, Hit
from embedder.search.documents import Documents
from embedder.search.index import Index
from embedder.search.page_images import PAGE_PIXELS, PageImages
from embedder.search.records import Records, has_picture, text_of
from embedder.search.snippet import find_lines, find_snippet
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics

MAX_RESULTS = 500
MAX_LINES, MAX_LINE_CHARS = 3, 200
MAX_TEXT_CHARS = 10_000  # of a row that is a text
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class SearchRequest(RequestBody):
    """Body of `POST /playground/search`. Without a vector, the first rows are returned."""

    vector: str | None = Field(None, description="The query's vector, float32 in base64.")
    question: str = Field("", max_length=100_000, description="Its words choose the lines of the text layer.")
    limit: int = Field(10, ge=1, le=MAX_RESULTS)


class CollectionRoutes:
    """ASGI app: what the playground asks about a collection, and `service` for every other path.

    `documents` reads what a reranker judges; None without one.
    """

    def __init__(
        self, collection: Collection, settings: Settings, service: Routes, documents: Documents | None
    ) -> None:
        self._collection = collection
        self._index = Index(collection)
        self._service = service
        self._documents = documents
        self._records = Records(collection, settings)
        self._images = PageImages(collection.folder, settings, collection.state) if collection.folder else None
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self._start,
            "/playground/collection": self._fields,
            "/playground/thumbnails/{row}": self._thumbnail,
            "/playground/pages/{row}": self._page,
            "/playground/files/{row}": self._file,
        }
        routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()]
        post = {"/playground/search": self._search, "/playground/rerank": self._rerank}
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()]
        self._router = Router(routes, default=service.over(not_found))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._router(scope, receive, send)

    @property
    def num_rows(self) -> int:
        """Number of rows that can be found."""
        return len(self._index.ids)

    def close(self) -> None:
        """End the processes that open documents."""
        for one in (self._images, self._documents):
            if one:
                one.close()

    async def _start(self, _: Request) -> Response:
        return RedirectResponse("playground#search")

    async def _fields(self, _: Request) -> Response:
        folder = self._collection.folder
        fields = {
            "status": "ready" if self._index.ids else "none",
            "title": folder.name if folder else "",
            "has_pages": True,
            "unit": "row" if await asyncio.to_thread(lambda: self._records.exist) else "page",
            "num_pictures": len(self._index.ids),
            "num_done": len(self._index.ids),
            "dimensions": self._collection.num_values,
            "query_instruction": QUERY_INSTRUCTION,
            "default_instruction": self._collection.default_instruction,
        }
        return json_response(to_json(fields), HEADERS)

    async def _search(self, request: Request) -> Response:
        asked = validate_body(SearchRequest, read_json((await request.receive())["body"]))
        query = None if asked.vector is None else _vector(asked.vector, self._collection.num_values)
        return json_response(to_json({"results": await asyncio.to_thread(self._find, asked, query)}), HEADERS)

    def _find(self, asked: SearchRequest, query: NDArray[np.float32] | None) -> list[dict[str, Any]]:
        """The fields of the rows nearest to the query, or of the first rows."""
        hits = self._index.first_rows(asked.limit) if query is None else self._index.search(query, asked.limit)
        if not self._records.exist:
            return [_fields(hit, asked) | {"text": None, "has_picture": True} for hit in hits]
        records = self._records.read(hits)
        return [_fields(hit, asked) | _content(record) for hit, record in zip(hits, records, strict=True)]

    async def _rerank(self, request: Request) -> Response:
        score = self._service.scoring()
        return await rerank_found(request, self._service.bodies, self._read_rows, score)

    def _read_rows(self, rows: Sequence[int]) -> list[EmbeddingItem | EmbedderError]:
        assert self._documents is not None  # or there would be no scoring
        if not all(0 <= row < self.num_rows for row in rows):
            raise NotFound(f"the collection has no such rows: got {rows}; allowed: 0 to {self.num_rows - 1}")
        return self._documents.read([self._index.row(row) for row in rows])

    async def _thumbnail(self, request: Request) -> Response:
        row, images = self._row(request)
        data = await asyncio.to_thread(self._index.thumbnail, row)
        return _jpeg_response(data) if data else await self._picture(row, images, THUMBNAIL_PIXELS)

    async def _page(self, request: Request) -> Response:
        return await self._picture(*self._row(request), PAGE_PIXELS)

    async def _picture(self, row: int, images: PageImages, max_pixels: int) -> Response:
        if not self._records.exist:
            return _jpeg_response(await asyncio.to_thread(images.render, self._index.ids[row], max_pixels))
        load = partial(self._records.picture, self._index.row(row))
        return _jpeg_response(await asyncio.to_thread(images.render_other, f"row {row}", load, max_pixels))

    async def _file(self, request: Request) -> Response:
        row, images = self._row(request)
        path = images.source(self._index.ids[row])
        headers = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, 200, headers, kind, filename=path.name, content_disposition_type="inline")

    def _row(self, request: Request) -> tuple[int, PageImages]:
        """The number of the row that the path names, and what renders it. Raises `NotFound`."""
        number = request.path_params["row"]
        is_number = number.isdecimal() and number.isascii() and len(number) < 10
        if not is_number or int(number) >= self.num_rows:
            raise NotFound("the collection has no such row")
        if self._images is None:
            raise NotFound("the output does not say from which folder it was made; an older version wrote it")
        return int(number), self._images


class LocalOnly:
    """ASGI middleware: refuses a `Host` that does not name this machine.

    The page of another site could let its own name lead to this machine, and so read the collection (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            if host.rpartition("]")[0].lstrip("[") not in _LOCAL_NAMES and host.partition(":")[0] not in _LOCAL_NAMES:
                raise InvalidRequest(f"host: got {host[:80]!r}; allowed: {', '.join(_LOCAL_NAMES)}")
        await self._app(scope, receive, send)


def serve(collection: Collection, settings: Settings, host: str, port: int) -> None:
    """Serve until a signal ends it. Raises `OSError` if the port is taken, `ValueError`, and `ModelUnavailable`."""
    settings = settings.model_copy(update={"demo_folder": ""})
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    with listening, contextlib.closing(Models(settings)) as models, contextlib.ExitStack() as stack:
        service = stack.enter_context(contextlib.closing(_service_routes(models, settings)))
        regime = models.reranker.preprocessor.vision.regime if models.reranker else None
        documents = Documents(collection, settings, regime) if regime else None
        app = stack.enter_context(contextlib.closing(CollectionRoutes(collection, settings, service, documents)))
        shown = f"[{host}]" if ":" in host else host
        print(f"search {app.num_rows} rows at http://{shown}:{listening.getsockname()[1]}/", flush=True)
        guarded = with_guards(app, settings, is_local=host in _LOCAL_NAMES)
        server = uvicorn.Server(uvicorn.Config(guarded, log_level="warning", lifespan="off", server_header=False))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def with_guards(app: ASGIApp, settings: Settings, *, is_local: bool) -> ASGIApp:
    """The app within the limits and the keys of the service."""
    drain = Drain()
    guarded: ASGIApp = RequestGuard(
        app, settings, keys=ApiKeys(settings), drain=drain, open_paths=OPEN_PATHS | frozenset({"/"})
    )
    return RequestBoundary(LocalOnly(guarded) if is_local else guarded, drain=drain, is_logged=False)


def _service_routes(models: Models, settings: Settings) -> Routes:
    """The service's routes over the models."""
    version = embedder.__version__
    routes = Routes(settings, Metrics(()), version=version, needs_key=ApiKeys(settings).are_needed)
    info = {**models.info(), "version": version}
    embedding, reranking = (
        ServedModel(one.checkpoint.name, settings.max_input_tokens, info) if one else None
        for one in (models.embedder, models.reranker)
    )
    pictures = Pictures(settings, is_bundled_model=False)
    routes.serving = Serving(
        models.engine, models.preprocessor, embedding, info, pictures, time.monotonic(), lambda: True, reranking
    )
    return routes


def _jpeg_response(data: bytes) -> Response:
    return Response(data, headers={**HEADERS, "cache-control": "no-cache"}, media_type="image/jpeg")


def _vector(base64: str, max_values: int) -> NDArray[np.float32]:
    """The query's vector. Raises `InvalidRequest`."""
    try:
        data = decode_base64(base64)
    except ValueError as error:
        raise InvalidRequest(f"vector is not valid base64: {error}") from error
    num_values, rest = divmod(len(data), 4)
    if rest or not 1 <= num_values <= max_values:
        raise InvalidRequest(f"vector of {len(data)} bytes; allowed: 1 to {max_values} values of 4 bytes")
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(vector).all() or not np.linalg.norm(vector):
        raise InvalidRequest("vector has values that are not finite, or only zeros")
    return vector


def _content(record: EmbeddingItem | EmbedderError) -> dict[str, Any]:
    """What a row that is no file of a folder has to show, or why it has nothing anymore."""
    if isinstance(record, EmbedderError):
        return {"text": "", "has_picture": False, "unread": record.message}
    text = text_of(record)
    shown = text if len(text) <= MAX_TEXT_CHARS else f"{text[: MAX_TEXT_CHARS - 1]}…"
    return {"text": shown, "has_picture": has_picture(record)}


def _fields(hit: Hit, asked: SearchRequest) -> dict[str, Any]:
    lines = find_lines(hit.text, asked.question, MAX_LINES, MAX_LINE_CHARS)
    return {
        "row": hit.row,
        "file": hit.file,
        "page": hit.page or None,
        "seconds": hit.place if hit.segment else None,
        "is_clip": is_clip(hit.file),
        "score": round(hit.score, 4) if asked.vector else None,
        "lines": lines or [one for one in [find_snippet(hit.text, "", MAX_LINE_CHARS)] if one],
    }
