"""Every route of the service that is not BentoML's own, in one table each for POST and GET."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.engine.aio import embed_all, embed_each
from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError, NotFound, NotReady
from embedder.http.dialects import cohere, embed, local, openai
from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel
from embedder.http.openapi import ROW_EXAMPLES, openapi_document
from embedder.http.response import to_json
from embedder.playground.collection import HEADERS, PAGE, Collection, page_file
from embedder.settings import Settings
from embedder.telemetry.log import count_items
from embedder.telemetry.metrics import CONTENT_TYPE, Metrics

if TYPE_CHECKING:
    from embedder.engine.engine import Engine
    from embedder.inputs.items import EmbeddingItem

Result = TypeVar("Result")

DIALECTS: tuple[Dialect[Any], ...] = (local.TEXTS, local.IMAGES, embed.EMBED, openai.EMBEDDINGS, cohere.EMBED)
EXAMPLES = {**{dialect.path: dialect.examples for dialect in DIALECTS}, **ROW_EXAMPLES}  # bodies by path and name
EMBEDDING_PATHS = tuple(dialect.path for dialect in DIALECTS)
OPEN_PATHS = frozenset({"/playground", "/playground/", *(f"/playground/{name}" for name in PAGE)})  # need no key

WATCH_AFTER_S = 0.1  # after which a request without a response starts to watch for its caller's disconnect


@dataclass(frozen=True)
class Serving:
    """What a worker serves once its model is loaded. `is_ready` tells probes whether to send requests."""

    engine: Engine
    model: ServedModel
    info: Mapping[str, Any]
    collection: Collection
    started_s: float
    is_ready: Callable[[], bool]


class Routes:
    """ASGI app: this service's routes, and `default` for every other path. Routes raise; they render no errors."""

    def __init__(self, settings: Settings, metrics: Metrics, *, version: str, needs_key: bool) -> None:
        self.settings = settings
        self.metrics = metrics
        self.serving: Serving | None = None
        self._default: ASGIApp = not_found
        self._document = to_json(openapi_document(DIALECTS, settings, version, needs_key=needs_key))
        self._dialects = {dialect.path: dialect for dialect in DIALECTS}
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/models": self._models,
            "/health": self._health,
            "/info": self._info,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
            "/docs.json": self._openapi,  # where BentoML has its own
            "/playground/collection": self._collection,
            "/playground/thumbnails/{index}": self._thumbnail,
            "/playground": self._playground,
            "/playground/{name}": self._playground,
        }
        self._router = Router([Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()])
        self._router.routes += [Route(path, self._embed, methods=["POST"]) for path in EMBEDDING_PATHS]

    def over(self, default: ASGIApp) -> ASGIApp:
        """These routes, with `default` for the paths that they do not have."""
        self._default = self._router.default = default
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._default(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"] in self._dialects:
            response = await self._embed(Request(scope, receive))  # Starlette's router would take some percent longer
            await response(scope, receive, send)
        else:
            await self._router(scope, receive, send)

    async def embed_rows(self, items: Sequence[EmbeddingItem | EmbedderError], receive: Receive) -> Response:
        """A JSON list of vectors, for BentoML's own APIs."""
        embeddings = await unless_disconnected(self._embed_all(items), receive)
        return json_response(to_json([one.vector for one in embeddings]), self._cache_headers(embeddings))

    async def _embed(self, request: Request) -> Response:
        dialect = self._dialects[request.scope["path"]]
        body = (await request.receive())["body"]  # the guard has read all of it
        parsed = dialect.parse(body, self.settings)
        embed_items = self._embed_each if dialect.fails_per_item else self._embed_all
        outcomes = await unless_disconnected(embed_items(parsed.items), request.receive)
        return json_response(dialect.respond(parsed, outcomes, self._serving.model), self._cache_headers(outcomes))

    async def _embed_all(self, items: Sequence[EmbeddingItem | EmbedderError]) -> Sequence[Embedding]:
        embeddings = await embed_all(self._serving.engine, items, self.settings.request_timeout_s)
        _count_for_log(embeddings)
        return embeddings

    async def _embed_each(self, items: Sequence[EmbeddingItem | EmbedderError]) -> Outcomes:
        outcomes = await embed_each(self._serving.engine, items, self.settings.request_timeout_s)
        _count_for_log(outcomes)
        return outcomes

    @property
    def _serving(self) -> Serving:
        if self.serving is None:
            raise NotReady("the model is not loaded yet")
        return self.serving

    def _cache_headers(self, outcomes: Outcomes) -> dict[str, str] | None:
        if not self.settings.cache_bytes:
            return None
        num_hits = sum(isinstance(outcome, Embedding) and outcome.is_cached for outcome in outcomes)
        return {"x-embedding-cache": f"hits={num_hits}"}

    async def _models(self, _: Request) -> Response:
        return json_response(openai.models_response(self._serving.model, self._serving.started_s))

    async def _health(self, _: Request) -> Response:
        if not self._serving.is_ready():
            raise NotReady("the service is not ready")
        return json_response(b'{"status":"ready"}')

    async def _info(self, _: Request) -> Response:
        return json_response(to_json(self._serving.info))

    async def _metrics(self, _: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.exposition), media_type=CONTENT_TYPE)

    async def _openapi(self, _: Request) -> Response:
        return json_response(self._document)

    async def _collection(self, _: Request) -> Response:
        return json_response(to_json(self._serving.collection.fields()), HEADERS)

    async def _thumbnail(self, request: Request) -> Response:
        index = request.path_params["index"]
        is_number = index.isdecimal() and len(index) < 10  # a route of `int` would convert any number of digits
        picture = self._serving.collection.thumbnail(int(index)) if is_number else None
        return _file_response((picture, "image/webp") if picture else None)

    async def _playground(self, request: Request) -> Response:
        return _file_response(page_file(request.path_params.get("name", "index.html")))


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI app without any routes."""
    raise NotFound("there is no such path")


def json_response(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """A response with status 200."""
    return Response(body, headers=headers, media_type="application/json")


async def unless_disconnected(work: Awaitable[Result], receive: Receive) -> Result:
    """Await `work`; if the caller disconnects, cancel it and raise `ClientDisconnect`."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    disconnect: asyncio.Future[Message] = loop.create_future()
    is_over = False

    def watch() -> None:
        nonlocal disconnect
        disconnect = asyncio.ensure_future(receive())
        disconnect.add_done_callback(lambda _: is_over or disconnect.cancelled() or task.cancel())

    timer = loop.call_later(WATCH_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if disconnect.cancelled() or not disconnect.done():
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        is_over = True
        timer.cancel()
        disconnect.cancel()


def _count_for_log(outcomes: Outcomes) -> None:
    count_items(len(outcomes), sum(one.num_tokens for one in outcomes if isinstance(one, Embedding)))


def _file_response(file: tuple[bytes, str] | None) -> Response:
    if file is None:
        raise NotFound("the playground has no such file")
    return Response(file[0], headers={**HEADERS, "cache-control": "no-cache"}, media_type=file[1])
