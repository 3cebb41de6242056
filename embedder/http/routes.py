"""Every route of the service that is not BentoML's own, in one table each for POST and GET."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from embedder.engine.aio import embed_all, embed_each, score_each
from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError, InvalidRequest, NotFound, NotReady
from embedder.http.batches.batches import BATCH_PRIORITY, Batches
from embedder.http.batches.routes import FILES_PATH
from embedder.http.body_reader import BodyReader, InFormOf, ReadBody
from embedder.http.dialects import (
    cohere,
    dashscope,
    document,
    embed,
    infinity,
    kserve,
    local,
    ollama,
    openai,
    openai_models,
    pooling,
    rerank,
    tei,
    tokens,
    vertex,
    voyage,
)
from embedder.http.dialects.dialect import Dialect, Outcomes, Role, ServedModel, TokenRoute, by_path
from embedder.http.dialects.rows import row_items, row_queries, score_rows, scores_response
from embedder.http.dialects.scoring import ScoringRequest
from embedder.http.disconnect import unless_disconnected
from embedder.http.document_pages import DocumentPages
from embedder.http.openapi import ROW_EXAMPLES, openapi_document
from embedder.http.playground_routes import PlaygroundRoutes, Score
from embedder.http.request_body import read_json
from embedder.http.response import json_response, to_json, with_headers
from embedder.http.response_writer import ResponseWriter
from embedder.http.timing import timing_headers, traced_items
from embedder.http.token_thread import TokenThread
from embedder.playground.collection import Collection
from embedder.settings import Settings, vertex_routes
from embedder.telemetry.log import count_items
from embedder.telemetry.metrics import CONTENT_TYPE, Metrics

if TYPE_CHECKING:
    from embedder.engine.engine import Engine
    from embedder.inputs.items import EmbeddingItem
    from embedder.inputs.preprocess import Preprocessor

DIALECTS: tuple[Dialect[Any], ...] = (
    local.TEXTS,
    local.IMAGES,
    *tei.SHARED,
    embed.EMBED,
    openai.EMBEDDINGS,
    infinity.EMBED,
    openai.INVOCATIONS,
    pooling.POOLING,
    cohere.EMBED,
    cohere.EMBED_V1,
    voyage.MULTIMODAL,
    tei.SIMILARITY,
    ollama.EMBED,
    ollama.PROMPT,
    dashscope.MULTIMODAL,
    kserve.INFER,
    vertex.PREDICT,
)
EMBEDDING_PATHS = tuple(by_path(DIALECTS))
RERANKING_PATHS = tuple(path for path in by_path(rerank.RERANKING) if path not in EMBEDDING_PATHS)
UPLOAD_PATHS = frozenset({FILES_PATH, *(one.path for one in DIALECTS if one.upload)})  # take files, too
EXAMPLES: dict[str, dict[str, Any]] = {  # bodies by path and name
    **{
        path: {name: body for one in dialects for name, body in one.examples.items()}
        for path, dialects in by_path(DIALECTS).items()
    },
    **{route.path: dict(route.examples) for route in tokens.ROUTES},
    **ROW_EXAMPLES,
}
_POST_PATHS = (*EXAMPLES, *(path for path in RERANKING_PATHS if path not in EXAMPLES))


@dataclass(frozen=True)
class Serving:
    """What a worker serves once its models are loaded. `is_ready` tells probes whether to send requests.

    `model` is the embedding model, and `reranker` the reranker; at least one of them is served.
    """

    engine: Engine
    preprocessor: Preprocessor
    model: ServedModel | None
    info: Mapping[str, Any]
    collection: Collection
    started_s: float
    is_ready: Callable[[], bool]
    reranker: ServedModel | None = None


class ModelName(PathConvertor):
    """A model's name in a path; it may be a hub id, which has a slash. A final `/infer` is not part of the name."""

    regex = r"[\s\S]+(?<!/infer)"


register_url_convertor("model", ModelName())


class Routes:
    """ASGI app: this service's routes, and `default` for every other path. Routes raise; they render no errors.

    `other_names`: names under which the operator's platform asks for some of the paths.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, version: str, needs_key: bool) -> None:
        self.settings = settings
        self.metrics = metrics
        self.serving: Serving | None = None
        self.bodies = BodyReader(settings)
        self._responses = ResponseWriter()
        self._document_pages = DocumentPages(settings)
        optional = (document.EMBED,) if settings.max_document_pages else ()
        served = (*optional, *DIALECTS, *(rerank.RERANKING if settings.reranker else ()))
        self._document = to_json(openapi_document(served, settings, version, needs_key=needs_key))
        self._dialects = by_path((document.EMBED, *rerank.RERANKING, *DIALECTS))
        self._tokenizing = TokenThread(settings.request_timeout_s)
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/models": self._models,
            "/v1/models/{id:path}": self._one_model,
            "/models": self._infinity_models,
            "/health": self._health_with_time,
            "/ping": self._health,  # SageMaker's and vLLM's
            "/version": self._page(lambda _: {"version": version}),  # vLLM's
            "/api/version": self._page(lambda _: {"version": version}),
            "/api/tags": self._page(ollama.tags),
            "/v2": self._page(kserve.server_metadata),
            "/v2/health/live": self._live,
            "/v2/health/ready": self._health,
            "/v2/models/{model:model}/ready": self._of_model(self._health),
            "/info": self._info,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
            "/docs.json": self._openapi,  # where BentoML has its own
        }
        post: dict[str, Callable[[Request], Awaitable[Response]]] = {
            **{path: partial(self._infer, dialects) for path, dialects in self._dialects.items()},
            **{route.path: partial(self._tokens, route) for route in tokens.ROUTES},
        }
        own_paths = {**get, **post}.keys() - {"/"}  # an operator may name even the root for Vertex AI
        post[kserve.INFER.path] = self._of_model(post[kserve.INFER.path])
        self.other_names = {name: path for name, path in vertex_routes().items() if name not in own_paths}
        get_routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()]
        post_routes = [Route(_any_model(path), endpoint, methods=["POST"]) for path, endpoint in post.items()]
        self._batches = Batches(settings)
        # last, because its path takes any rest
        about_model = self._of_model(self._page(kserve.model_metadata))
        metadata = Route("/v2/models/{model:model}", about_model, methods=["GET"])
        playground = PlaygroundRoutes(self.bodies, lambda: self._serving.collection, self.scoring)
        root = Route("/", self._root, methods=["GET", "POST"])
        routes = [root, *get_routes, *post_routes, *self._batches.routes, *playground.routes, metadata]
        self._router = Router(routes, redirect_slashes=False)
        self.over(not_found)

    def over(self, default: ASGIApp, around_others: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> ASGIApp:
        """These routes, with `default` for the paths that they do not have.

        `around_others` wraps both, except the routes that embed or rank, which raise all their errors.
        """
        self._default = self._router.default = default
        self._others = around_others(self._router)
        return self

    def close(self) -> None:
        """End the processes of the routes."""
        self._document_pages.close()

    async def stop_batches(self) -> None:
        """Cancel the lines of batches that run; they run again after the next start."""
        await self._batches.close()

    def run_batches(self, is_stopping: Callable[[], bool]) -> None:
        """Run OpenAI's batches, if the service has them, until the worker stops."""
        self._batches.start(self._respond_to_line, lambda: self._serving.engine.pending_tokens, is_stopping)

    async def _respond_to_line(self, path: str, fields: Mapping[str, Any]) -> bytes:
        """The body of a route's response to a line of a batch."""
        dialects = self._dialects[path]
        model = self._served(dialects[0].role)
        read = await self.bodies.parse(dialects, fields)
        outcomes = await self._outcomes(read._replace(priority=max(read.priority, BATCH_PRIORITY)))
        response = await self._responses.write(read.dialect, read.parsed, outcomes, model)
        if isinstance(response, bytes):
            return response
        raise InvalidRequest("encoding_format: responses in a batch are JSON; allowed: float, base64")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._default(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"] in self._dialects:
            # Starlette's router would take a few percent longer
            response = await self._infer(self._dialects[scope["path"]], Request(scope, receive))
            await response(scope, receive, send)
        else:
            await self._others(scope, receive, send)

    async def embed_rows(self, rows: Sequence[Any], receive: Receive) -> Response:
        """A JSON list of vectors, for BentoML's own APIs."""
        self._served("embedder")
        embeddings = await unless_disconnected(self._embed_all(row_items(rows)), receive)
        return json_response(to_json([one.vector for one in embeddings]), self._cache_headers(embeddings))

    async def score_rows(self, rows: Sequence[Any], receive: Receive) -> Response:
        """A JSON list of scores for each query, for BentoML's own API."""
        self._served("reranker")
        requests = row_queries(rows, self.settings)
        outcomes = await unless_disconnected(score_rows(requests, self._score_each), receive)
        return json_response(scores_response(requests, outcomes))

    async def _infer(self, dialects: Sequence[Dialect[Any]], request: Request) -> Response:
        started_s = time.monotonic()
        if len({one.role for one in dialects}) == 1:  # else the body decides
            self._served(dialects[0].role)
        read = await self.bodies.read(dialects, request)
        with InFormOf(read.dialect):
            model = self._served(read.dialect.role)
            with traced_items() as traces:
                outcomes = await unless_disconnected(self._outcomes(read), request.receive)
            response = await self._responses.write(read.dialect, read.parsed, outcomes, model)
        cache = self._cache_headers(outcomes) if read.dialect.role == "embedder" else None
        return with_headers(response, {**timing_headers(started_s, traces), **(cache or {})})

    async def _outcomes(self, read: ReadBody) -> Outcomes:
        parsed, engine = read.parsed, self._serving.engine
        outcomes: Outcomes
        if isinstance(parsed, ScoringRequest):
            return await self._score_each(parsed, read.priority)
        if isinstance(parsed, document.DocumentPagesRequest):
            regime = self._serving.preprocessor.vision.regime
            outcomes = await self._document_pages.embed(parsed, engine, regime, read.priority)
        else:
            embed_items = embed_each if read.dialect.fails_per_item else embed_all
            outcomes = await embed_items(engine, parsed.items, self.settings.request_timeout_s, read.priority)
        _count_for_log(outcomes)
        return outcomes

    def scoring(self) -> Score:
        """The function that scores a request's documents. Raises `NotFound` if the service has no reranker."""
        self._served("reranker")
        return self._score_each

    async def _score_each(self, parsed: ScoringRequest, priority: int = 0) -> Outcomes:
        timeout_s = self.settings.request_timeout_s
        outcomes = await score_each(self._serving.engine, parsed.query, parsed.items, timeout_s, priority)
        _count_for_log(outcomes)
        return outcomes

    async def _tokens(self, route: TokenRoute, request: Request) -> Response:
        body = (await request.receive())["body"]

        def work() -> bytes:
            return to_json(route.handle(read_json(body), self._serving.preprocessor, self.settings))

        return json_response(await unless_disconnected(self._tokenizing.run(work, len(body)), request.receive))

    def _page(self, fields: Callable[[ServedModel], Any]) -> Callable[[Request], Awaitable[Response]]:
        """A handler that responds with these fields of the served model."""

        async def page(_: Request) -> Response:
            return json_response(to_json(fields(self._models_served()[0])))

        return page

    def _of_model(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A handler of a path with a model's name, which raises `NotFound` if it is none."""

        async def checked(request: Request) -> Response:
            names = [model.name for model in self._models_served()]
            kserve.check_model_name(request.path_params["model"], names)
            return await handle(request)

        return checked

    def _served(self, role: Role) -> ServedModel:
        """The model of a role. Raises `NotFound` if the service has none."""
        model = self._serving.reranker if role == "reranker" else self._serving.model
        if model is None:
            variable = "EMBEDDER_RERANKER" if role == "reranker" else "EMBEDDER_MODEL"
            raise NotFound(f"this service has no {role}: the operator sets {variable}")
        return model

    async def _embed_all(self, items: Sequence[EmbeddingItem | EmbedderError]) -> Sequence[Embedding]:
        embeddings = await embed_all(self._serving.engine, items, self.settings.request_timeout_s)
        _count_for_log(embeddings)
        return embeddings

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

    async def _root(self, request: Request) -> ASGIApp:
        """The default's page; TEI's clients post to the same path."""
        if request.method == "POST":
            return await self._infer(self._dialects["/"], request)
        return self._default

    async def _models(self, _: Request) -> Response:
        return json_response(openai_models.models_response(self._models_served(), self._serving.started_s))

    async def _one_model(self, request: Request) -> Response:
        name, started_s = request.path_params["id"], self._serving.started_s
        return json_response(openai_models.model_response(name, self._models_served(), started_s))

    async def _infinity_models(self, _: Request) -> Response:
        return json_response(infinity.models_response(self._models_served(), self._serving.started_s))

    def _models_served(self) -> list[ServedModel]:
        return [model for model in (self._serving.model, self._serving.reranker) if model]

    async def _health(self, _: Request) -> Response:
        if not self._serving.is_ready():
            raise NotReady("the service is not ready")
        return json_response(b'{"status":"ready"}')

    async def _health_with_time(self, request: Request) -> Response:
        """Infinity's clients read the time."""
        await self._health(request)
        return json_response(to_json({"status": "ready", "unix": self._models_served()[0].now()}))

    async def _live(self, _: Request) -> Response:
        return json_response(b'{"live":true}')

    async def _info(self, _: Request) -> Response:
        return json_response(to_json({**self._serving.info, **tei.info_fields(self._models_served()[0])}))

    async def _metrics(self, _: Request) -> Response:
        self.metrics.http.write()
        return Response(await asyncio.to_thread(self.metrics.exposition), media_type=CONTENT_TYPE)

    async def _openapi(self, _: Request) -> Response:
        return json_response(self._document)


def _any_model(path: str) -> str:
    return path.replace("{model}", "{model:model}")


def path_hint(path: str) -> str:
    """The path of a POST route that a caller of an unknown path may mean; empty if there is none.

    A misspelled path resembles one of them; a path after a base URL with one part too many ends with one.
    """
    nearest = difflib.get_close_matches(path, _POST_PATHS, 1, 0.75)
    if nearest and difflib.SequenceMatcher(None, path, nearest[0]).ratio() > 0.85:
        return nearest[0]
    return max((known for known in _POST_PATHS if path.endswith(known)), key=len, default="".join(nearest))


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI app without any routes."""
    raise NotFound("there is no such path")


def _count_for_log(outcomes: Outcomes) -> None:
    count_items(len(outcomes), sum(one.num_tokens for one in outcomes if isinstance(one, Embedding)))
