"""The BentoML service: settings, one engine in each worker, the routes, and which error has which status.

Public routes are a Starlette app mounted on the service: each awaits its items' futures and answers bytes. BentoML's
own serialization would block the event loop for 2 ms a vector. The adaptive-batching APIs for BentoML clients feed
the same engine.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, SupportsIndex

import bentoml
import torch
from bentoml.exceptions import BentoMLException
from pydantic import AfterValidator, BaseModel
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import embedder
from embedder import errors
from embedder.engine.aio import embed_all, embed_each
from embedder.engine.engine import Engine
from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError
from embedder.http.api_keys import ApiKeys
from embedder.http.cohere import cohere_response, parse_cohere
from embedder.http.embed import embed_response, parse_embed, whole_failure
from embedder.http.guard import RequestGuard
from embedder.http.json_limits import MAX_VALUES_PER_ITEM
from embedder.http.local import embedding_response, parse_image_request, parse_text_request
from embedder.http.openai import embeddings_response, models_response, parse_embeddings
from embedder.http.openapi import openapi_document
from embedder.http.request_body import EmbeddingRequest, check_item_count
from embedder.http.response import error_body, to_json
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, Text, item_from_fields
from embedder.model.checkpoint import find_checkpoint
from embedder.playground.collection import HEADERS, PAGE, Collection, page_file
from embedder.server.connection import bound_connections
from embedder.server.lifecycle import (
    Drain,
    check_port,
    end_with_arbiter,
    end_with_workers,
    give_up,
    own_server,
    stop_when_told,
)
from embedder.settings import Settings, make_metrics_folder, metrics_folder
from embedder.telemetry.log import configure_logging, count_items, request_id
from embedder.telemetry.metrics import CONTENT_TYPE, Metrics, MetricsMiddleware
from embedder.telemetry.tracing import TracingMiddleware, is_traced

logger = logging.getLogger("embedder.service")

STATUS: dict[type[EmbedderError], int] = {
    errors.InvalidRequest: 400,
    errors.RequestTooLarge: 413,
    errors.MediaTooLarge: 413,
    errors.UnsupportedContentType: 415,
    errors.MediaUnavailable: 424,
    errors.Overloaded: 429,
    errors.EngineFailed: 500,
    errors.DeviceFailed: 500,
    errors.ShuttingDown: 503,
    errors.DeadlineExceeded: 504,
}

EMBEDDING_ROUTES = frozenset({"/txt/embed", "/img/embed", "/embed", "/v1/embeddings", "/v2/embed"})

try:
    SETTINGS = Settings.from_environment()
    KEYS = ApiKeys(SETTINGS)
    METRICS = Metrics((*EMBEDDING_ROUTES, "/embed_texts", "/embed_images"), metrics_folder())
except (ValueError, OSError) as error:
    raise SystemExit(f"the service does not start: {error}") from None

REQUIREMENTS = Path(__file__).with_name("deploy").joinpath("requirements.txt").read_text(encoding="utf-8")

WATCHED_AFTER_S = 0.1  # a request that is not answered by then: whether its caller is still there

DRAIN = Drain()
OPEN_PATHS = frozenset({"/playground", "/playground/", *(f"/playground/{name}" for name in PAGE)})

app = Starlette()


class TooManyRows(BentoMLException):
    """`RequestTooLarge`, as BentoML wants to hear it."""

    error_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def _check_rows(rows: list[Any]) -> list[Any]:
    try:
        check_item_count(len(rows), SETTINGS)
    except errors.RequestTooLarge as error:
        raise TooManyRows(error.message) from error
    return rows


BentoRows = Annotated[list[Any], AfterValidator(_check_rows)]  # of one request: what is gathered is not checked again


@bentoml.service(
    name="qwen3-vl-embedding",
    workers=SETTINGS.num_workers(torch.cuda.device_count()),
    traffic={"timeout": 2 * SETTINGS.request_timeout_s + 30},  # ours, one for each, answer first
    logging={"access": {"enabled": False}},  # the edge writes ours
    # BentoML's defaults would leave compilers in the image, take any uv, and packages of the day it is built.
    image=bentoml.images.Image(base_image="python:3.11-slim-bookworm", distro="", lock_python_packages=False)
    .run("install -d -o bentoml -g bentoml /cache && pip install --no-cache-dir uv==0.13.9")
    .build_include("deploy/requirements-cuda.txt")
    .python_packages(REQUIREMENTS)
    # read by BentoML's entrypoint: the template's own BENTOML_HOME cannot be overridden, and may be read-only
    .run("echo export BENTOML_HOME=/tmp/bentoml >> /app/.venv/bin/activate"),
    tracing={"excluded_urls": ".*"},  # BentoML's tracing costs 0.2 ms a request, with or without an exporter
    metrics={"enabled": False},  # BentoML's keep 20 series for every path that anyone ever asked for
)
@bentoml.asgi_app(app)
class Qwen3VLEmbedding:
    """Text and images in, one vector per item out."""

    @bentoml.on_deployment
    @staticmethod
    def find_model() -> None:
        """Once, before the workers start: what is named is there, or the service says why not and does not start."""
        configure_logging(SETTINGS.log_format)
        end_with_workers()
        stop_when_told()
        try:
            make_metrics_folder()
            check_port()
            Collection(SETTINGS, is_bundled_model=find_checkpoint(SETTINGS).is_bundled)
        except (errors.ModelUnavailable, ValueError, OSError) as error:
            raise SystemExit(f"the service does not start: {error}") from None

    def __init__(self) -> None:
        configure_logging(SETTINGS.log_format)
        self.arbiter = os.getppid()
        worker = (bentoml.server_context.worker_index or 1) - 1
        with _or_give_up():
            self.embedder = embedder.Embedder(settings=SETTINGS, worker=worker, observer=METRICS, on_failure=self._end)
        self.collection = Collection(SETTINGS, is_bundled_model=self.embedder.checkpoint.is_bundled)
        self.is_ready = False
        self.started_s = time.time()
        app.state.service = self

    @bentoml.on_startup
    async def warm_up(self) -> None:
        """Embed something of each kind for real; only then is the service ready."""
        with _or_give_up():
            await _embed([EmbeddingItem((Text("ready?"),)), EmbeddingItem((Image(EXAMPLE_IMAGE),))])
        gc.freeze()  # what stays anyway: half a million objects, whose collection would stop every answer for 0.3 s
        if bentoml.server_context.worker_index:  # none where a program, not BentoML's arbiter, runs this
            server = own_server()
            bound_connections(server.config, SETTINGS.request_timeout_s)
            DRAIN.begin_at_sigterm(server, 2 * SETTINGS.request_timeout_s)  # for a body, and again for its items
            end_with_arbiter(self.arbiter)
        self.is_ready = True
        METRICS.serving(SETTINGS, self.embedder.info(), embedder.__version__)
        self.building = asyncio.create_task(self.collection.build(_engine()))  # held, or it might be collected

    @bentoml.on_shutdown
    def close(self) -> None:
        """Finish what was admitted."""
        self.is_ready = False
        self.embedder.close()

    def _end(self, _: str) -> None:
        """The device is lost to this process: who waits has been told, and a new process may have it back."""
        self.is_ready = False
        threading.Timer(1.0, os._exit, (1,)).start()  # once the answers are out

    def __is_ready__(self) -> bool:
        return self.is_ready and not DRAIN.is_draining

    # The engine below decides what runs together. BentoML only gathers: a batch is never split (a request's rows stay
    # in one slice, see `Rows`) and never shed.
    @bentoml.api(batchable=True, max_batch_size=1_000_000, max_latency_ms=3_600_000)
    async def embed_texts(self, texts: BentoRows) -> list[list[float]]:
        """One vector per text. A text is a string, or an object with `text`, `instruction`, `dimensions`."""
        return Rows({"text": row} if isinstance(row, str) else row for row in texts)

    @bentoml.api(batchable=True, max_batch_size=1_000_000, max_latency_ms=3_600_000)
    async def embed_images(self, images: BentoRows) -> list[list[float]]:
        """One vector per image. An image is base64, or an object with `image`, `instruction`, `dimensions`."""
        return Rows({"image": row} if isinstance(row, str) else row for row in images)


for _name in ("embed_texts", "embed_images"):  # what BentoML makes of their signatures takes any field beside the rows
    _fields: type[BaseModel] = Qwen3VLEmbedding.apis[_name].input_spec  # type: ignore[attr-defined]  # made a Service
    _fields.model_config["extra"] = "forbid"
    _fields.model_rebuild(force=True)


@contextmanager
def _or_give_up() -> Iterator[None]:
    """A worker that fails inside ends the service: with one line, or with a traceback where it is a fault of ours."""
    try:
        yield
    except Exception as error:
        if not bentoml.server_context.worker_index:
            raise
        if not isinstance(error, EmbedderError):
            logger.exception("a fault of ours")
        give_up(error if isinstance(error, EmbedderError) else type(error).__name__)


class Rows(list[Any]):
    """Rows that BentoML has gathered of several requests. It cuts them in slices, one a request: its whole answer."""

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        rows = super().__getitem__(key)
        return Vectors(rows) if isinstance(key, slice) else rows


class Vectors(Response):
    """The vectors of one request's rows, embedded as it is sent.

    So in that request's own context, line and time: BentoML runs one gathered batch after the other.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        super().__init__()
        self.rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Embed and send them."""
        response = await _answered(_while_wanted(self._embed(), receive), scope["path"])
        response.background = self.background
        await response(scope, receive, send)

    async def _embed(self) -> Response:
        embeddings = await _embed([_row_item(row) for row in self.rows])
        return _json_response(to_json([one.vector for one in embeddings]), headers=_cache_headers(embeddings))


def _row_item(row: Any) -> EmbeddingItem | EmbedderError:
    try:
        return item_from_fields(row)
    except EmbedderError as error:
        return errors.without_traceback(error)


async def _embed(items: Sequence[EmbeddingItem | EmbedderError]) -> list[Embedding]:
    embeddings = await embed_all(_engine(), items, SETTINGS.request_timeout_s)
    count_items(len(embeddings), sum(one.num_tokens for one in embeddings))
    return embeddings


def _engine() -> Engine:
    engine: Engine = app.state.service.embedder.engine
    return engine


Handler = Callable[[Request], Awaitable[Response]]
BodyHandler = Callable[[bytes], Awaitable[Response]]


class EmbeddingRoute:
    """ASGI app of a route that embeds: a whole body in, and while its caller is there, an answer out."""

    def __init__(self, path: str, handler: BodyHandler) -> None:
        self.path = path
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        body = (await receive())["body"]  # all of it, from the edge; what comes behind is that the caller has gone
        response = await _answered(_while_wanted(self.handler(body), receive), self.path)
        await response(scope, receive, send)


def _post(path: str) -> Callable[[BodyHandler], BodyHandler]:
    """Let a handler embed what is posted to `path`."""

    def register(handler: BodyHandler) -> BodyHandler:
        app.router.routes.append(Route(path, EmbeddingRoute(path, handler), methods=["POST"]))
        return handler

    return register


def _get(path: str) -> Callable[[Handler], Handler]:
    """Serve a handler at `path`. A body, if there is one, the edge has not read, and nobody does."""

    def register(handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            return await _answered(handler(request), path)

        app.router.routes.append(Route(path, guarded, methods=["GET"]))
        return handler

    return register


async def _answered(work: Awaitable[Response], path: str) -> Response:
    """What it raises becomes an answer; nothing escapes into BentoML's middlewares."""
    try:
        return await work
    except ClientDisconnect:
        return Response(status_code=errors.NO_ANSWER)
    except EmbedderError as error:
        return _error_response(errors.without_traceback(error))
    except Exception:
        logger.exception("an error of ours at %s", path)
        text = f"internal error; the service's log has the reason at request {request_id()}"
        return _error_response(EmbedderError(text))


async def _while_wanted(work: Awaitable[Response], receive: Receive) -> Response:
    """What `work` gives. Cancelled, raising `ClientDisconnect`, once the caller has gone away."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    gone: asyncio.Future[Message] = loop.create_future()
    is_over = False

    def watch() -> None:
        nonlocal gone
        gone = asyncio.ensure_future(receive())
        gone.add_done_callback(lambda _: is_over or gone.cancelled() or task.cancel())

    timer = loop.call_later(WATCHED_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if gone.cancelled() or not gone.done():
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        is_over = True
        timer.cancel()
        gone.cancel()


@_post("/txt/embed")
async def embed_text(body: bytes) -> Response:
    return await _answer(parse_text_request(body, SETTINGS))


@_post("/img/embed")
async def embed_image(body: bytes) -> Response:
    return await _answer(parse_image_request(body, SETTINGS))


@_post("/embed")
async def embed_items(body: bytes) -> Response:
    parsed = parse_embed(body, SETTINGS)
    outcomes = await embed_each(_engine(), parsed.items, SETTINGS.request_timeout_s)
    count_items(len(outcomes), sum(one.num_tokens for one in outcomes if isinstance(one, Embedding)))
    failure = whole_failure(outcomes)
    answer = embed_response(parsed, outcomes, _model_name(), SETTINGS.max_input_tokens)
    return _json_response(answer, _status(failure) if failure else 200, _cache_headers(outcomes))


@_post("/v1/embeddings")
async def embed_openai(body: bytes) -> Response:
    parsed = parse_embeddings(body, SETTINGS)
    embeddings = await _embed(parsed.items)
    answer = embeddings_response(parsed, embeddings, _model_name(), SETTINGS.max_input_tokens)
    return _json_response(answer, headers=_cache_headers(embeddings))


@_get("/v1/models")
async def list_models(_: Request) -> Response:
    return _json_response(models_response(_model_name(), app.state.service.started_s, SETTINGS.max_input_tokens))


@_post("/v2/embed")
async def embed_cohere(body: bytes) -> Response:
    parsed = parse_cohere(body, SETTINGS)
    embeddings = await _embed(parsed.items)
    return _json_response(
        cohere_response(parsed, embeddings, SETTINGS.max_input_tokens), headers=_cache_headers(embeddings)
    )


@_get("/health")
async def health(_: Request) -> Response:
    if not app.state.service.__is_ready__():
        raise errors.ShuttingDown("the service is not ready")
    return _json_response(b'{"status":"ready"}')


@_get("/info")
async def info(_: Request) -> Response:
    return _json_response(to_json({**app.state.service.embedder.info(), "version": embedder.__version__}))


@_get("/metrics")
async def metrics(_: Request) -> Response:
    return Response(await asyncio.to_thread(METRICS.exposition), media_type=CONTENT_TYPE)


@_get("/playground/collection")
async def collection(_: Request) -> Response:
    return _json_response(to_json(app.state.service.collection.fields()), headers=HEADERS)


@_get("/playground/thumbnails/{index}")
async def thumbnail(request: Request) -> Response:
    index = request.path_params["index"]
    is_number = index.isdecimal() and len(index) < 10  # a route of `int` would convert any number of digits
    picture = app.state.service.collection.thumbnail(int(index)) if is_number else None
    return _file_response(picture and (picture, "image/webp"))


@_get("/playground")
@_get("/playground/{name}")
async def playground(request: Request) -> Response:
    return _file_response(page_file(request.path_params.get("name", "index.html")))


@_get("/openapi.json")
@_get("/docs.json")
async def openapi(_: Request) -> Response:
    return _json_response(to_json(openapi_document(SETTINGS, embedder.__version__, needs_key=KEYS.are_needed)))


async def _answer(request: EmbeddingRequest) -> Response:
    embeddings = await _embed(request.items)
    body = embedding_response(request, embeddings, _model_name(), SETTINGS.max_input_tokens)
    return _json_response(body, headers=_cache_headers(embeddings))


def _model_name() -> str:
    name: str = app.state.service.embedder.checkpoint.name
    return name


def _json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def _cache_headers(outcomes: Sequence[Embedding | EmbedderError]) -> dict[str, str] | None:
    """How many items of the answer were not computed for it; None where nothing is cached."""
    if not SETTINGS.cache_bytes:
        return None
    num_hits = sum(isinstance(outcome, Embedding) and outcome.is_cached for outcome in outcomes)
    return {"x-embedding-cache": f"hits={num_hits}"}


def _file_response(file: tuple[bytes, str] | None) -> Response:
    if file is None:
        return Response("Not Found", 404)  # in our shape at the edge
    return Response(file[0], headers={**HEADERS, "cache-control": "no-cache"}, media_type=file[1])


def _status(error: EmbedderError) -> int:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def _error_response(error: EmbedderError) -> Response:
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if isinstance(error, errors.Overloaded) else None
    return _json_response(error_body(error), _status(error), headers)


class Front:
    """What embeds goes to its route at once; the rest, and the worker's start and end, through BentoML's own stack.

    That one took a tenth of the requests a second (`python -m benchmarks.server --workload text-16`, model without
    computation, 64 callers, 2026-11-25), and keeps a timer for each until the traffic's time-out is over; Starlette's
    router took some percent.
    """

    def __init__(self, bento_app: ASGIApp) -> None:
        self.bento_app = bento_app
        self.routes = {route.path: route.app for route in app.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        is_ours = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in EMBEDDING_ROUTES
        await (self.routes[scope["path"]] if is_ours else self.bento_app)(scope, receive, send)


def _guard(bento_app: ASGIApp) -> ASGIApp:
    """The whole service, as the server sees it."""
    guarded: ASGIApp = RequestGuard(
        Front(bento_app),
        max_body_bytes=SETTINGS.max_body_bytes,
        max_held_bytes=SETTINGS.max_held_bytes,
        max_values=MAX_VALUES_PER_ITEM * SETTINGS.max_items_per_request,
        max_read_s=SETTINGS.request_timeout_s,
        keys=KEYS,
        drain=DRAIN,
        open_paths=OPEN_PATHS,
        is_logged=SETTINGS.access_log,
        count_held_bytes=METRICS.held_bytes.inc,
    )
    if is_traced():
        guarded = TracingMiddleware(guarded, routes=EMBEDDING_ROUTES, version=embedder.__version__)
    return MetricsMiddleware(guarded, metrics=METRICS)


class GuardedService(type(Qwen3VLEmbedding)):  # type: ignore[misc]  # the decorator made a BentoML Service of it
    """That service behind our own front: BentoML would add middlewares inside of its own alone."""

    __slots__ = ()

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """What the server of a worker serves."""
        return _guard(super().to_asgi(is_main))


Qwen3VLEmbedding.__class__ = GuardedService  # type: ignore[method-assign]  # mypy takes it for a method
