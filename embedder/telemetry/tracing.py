"""OpenTelemetry spans of a request's stages, without any of its content.

    POST /embed                 continues the caller's trace if a `traceparent` header came
        wait_preprocess         each item's wait for a thread
        preprocess              each item
        wait_device             each item's wait for its batch to start
        forward                 each batch with items of the request
        serialize               from the last vector to the head of the response

Spans exist only if the standard variables name an exporter; the SDK reads sampling, endpoint and service name itself.
They are created after the response, from the times that the engine recorded, so the engine does not depend on
OpenTelemetry. BentoML's adaptive-batching APIs mix callers and have no spans.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import Attributes

from embedder.engine.observer import ITEM_TRACES, ItemTrace
from embedder.settings import trace_exporter_variable
from embedder.telemetry.route_names import RouteNames, named_path

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MAX_ITEMS_WITH_SPANS = 32  # the slowest of a request; the exporter's queue holds 2048 spans
LAST_SPANS_S = 2.0  # for sending them at a stop; a collector that does not respond would delay it by its timeout, 10 s


def is_traced() -> bool:
    """Whether an exporter is configured and installed."""
    variable = trace_exporter_variable()
    if variable is None:
        return False
    try:
        _otlp_exporter()
    except ImportError:
        logger.warning("%s is set, but traces are not sent: install the extra `tracing`", variable)
        return False
    return True


def otlp_provider(version: str) -> TracerProvider:
    """A provider that sends spans over HTTP in the background."""
    ours = Resource({"service.name": "qwen3-vl-embedding", "service.version": version})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(_otlp_exporter()()))
    return provider


def _otlp_exporter() -> type[SpanExporter]:
    """The exporter of the extra `tracing`. Raises `ImportError`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter


class TracingMiddleware:
    """ASGI middleware: a span for each request to one of `routes`, and spans of its stages."""

    def __init__(
        self, app: ASGIApp, routes: Collection[str], version: str, provider: TracerProvider | None = None
    ) -> None:
        self.app = app
        self.routes = RouteNames(routes)
        self.provider = provider or otlp_provider(version)
        self.tracer = self.provider.get_tracer("embedder", version)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._handle_lifespan(scope, receive, send)
            return
        route = self.routes.of(named_path(scope)) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        span = self._begin(scope, route)
        if not span.is_recording():  # not sampled
            await self.app(scope, receive, send)
            return
        status, responded_s = 0, None

        async def watch(message: Message) -> None:
            nonlocal status, responded_s
            if message["type"] == "http.response.start":
                status, responded_s = message["status"], time.monotonic()
            await send(message)

        traces: list[ItemTrace] = []
        token = ITEM_TRACES.set(traces)
        try:
            await self.app(scope, receive, watch)
        finally:
            ITEM_TRACES.reset(token)
            _StageSpans(self.tracer, span).create(traces, responded_s)
            _end(span, status, traces)

    async def _handle_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the last spans before shutdown completes, for `LAST_SPANS_S`: no exit handler runs after that."""

        async def watch(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown"):
                await asyncio.to_thread(self._send_last_spans)
            await send(message)

        await self.app(scope, receive, watch)

    def _send_last_spans(self) -> None:
        sending = threading.Thread(target=self.provider.shutdown, daemon=True)  # which the process does not wait for
        sending.start()
        sending.join(LAST_SPANS_S)
        if sending.is_alive():
            logger.warning("the last spans are lost: they were not sent within %g s of the stop", LAST_SPANS_S)

    def _begin(self, scope: Scope, route: str) -> Span:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "http.route": route, "url.path": scope["path"]}
        return self.tracer.start_span(f"{scope['method']} {route}", extract(headers), SpanKind.SERVER, attributes)


class _StageSpans:
    """Creates spans of completed stages under a request's span. Times are seconds of `time.monotonic`."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._parent: Context = set_span_in_context(span)
        self._now_s = time.monotonic()
        self._epoch_ns = time.time_ns() - round(self._now_s * 1e9)

    def create(self, traces: list[ItemTrace], responded_s: float | None) -> None:
        for number, trace in _slowest(traces):
            self._create_item({"embedder.item.number": number, "embedder.item.kind": trace.kind}, trace)
        batches = Counter(trace.batch for trace in traces if trace.batch)
        for batch, num_items in batches.items():
            attributes = {"embedder.batch.items": batch.num_items, "embedder.batch.tokens": batch.num_tokens}
            self._stage("forward", batch.started_s, batch.ended_s, {"embedder.items": num_items, **attributes})
        if batches and responded_s is not None:
            self._stage("serialize", max(batch.ended_s for batch in batches), responded_s)

    def _create_item(self, item: Mapping[str, str | int], trace: ItemTrace) -> None:
        started_s, ended_s, batch = trace.preprocess_started_s, trace.preprocess_ended_s, trace.batch
        self._stage("wait_preprocess", trace.admitted_s, started_s, item)
        if started_s is not None:
            tokens = {"embedder.tokens": trace.num_tokens, "embedder.visual_tokens": trace.num_visual_tokens}
            self._stage("preprocess", started_s, ended_s, {**item, **tokens})
        if ended_s is not None and trace.num_tokens:
            self._stage("wait_device", ended_s, batch.started_s if batch else None, item)

    def _stage(self, name: str, start_s: float, end_s: float | None, attributes: Attributes = None) -> None:
        """A stage without an end ends now, and is marked as unfinished."""
        span = self._tracer.start_span(name, self._parent, attributes=attributes, start_time=self._ns(start_s))
        span.set_attribute("embedder.is_unfinished", end_s is None)
        span.end(self._ns(self._now_s if end_s is None else end_s))

    def _ns(self, seconds: float) -> int:
        return self._epoch_ns + round(seconds * 1e9)


def _slowest(traces: list[ItemTrace]) -> list[tuple[int, ItemTrace]]:
    """The slowest traces with their indices, in the order of admission."""

    def ended_s(entry: tuple[int, ItemTrace]) -> float:
        batch = entry[1].batch
        return batch.ended_s if batch else float("inf")

    return sorted(sorted(enumerate(traces), key=ended_s)[-MAX_ITEMS_WITH_SPANS:], key=lambda entry: entry[0])


def _end(span: Span, status: int, traces: list[ItemTrace]) -> None:
    span.set_attribute("embedder.items", len(traces))
    span.set_attribute("embedder.tokens", sum(trace.num_tokens for trace in traces))
    if status:
        span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)
    span.end()
