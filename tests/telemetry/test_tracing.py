"""The spans of a request: their tree, their attributes, and that they contain no content of the request."""

from __future__ import annotations

import asyncio
import http.server
import logging
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from embedder.engine.aio import embed_each
from embedder.engine.engine import Engine
from embedder.errors import DeadlineExceeded
from embedder.telemetry import tracing
from embedder.telemetry.tracing import MAX_ITEMS_WITH_SPANS, TracingMiddleware, is_traced
from tests.conftest import start_server
from tests.fake_model import FakeModel, item, running

TRACE_ID, PARENT_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = (b"traceparent", f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01".encode())


@pytest.fixture
def engine(model: FakeModel) -> Iterator[Engine]:
    with running(model) as engine:
        yield engine


def spans_of(
    engine: Engine,
    *texts: str,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    path: str = "/embed",
    timeout_s: float = 30,
    **options: Any,
) -> list[ReadableSpan]:
    """A request for `texts`, through the middleware and the engine -> its spans."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(**options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await embed_each(engine, [item(text) for text in texts], timeout_s)
        except DeadlineExceeded:
            await send({"type": "http.response.start", "status": 504})
        else:
            await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(TracingMiddleware(app, ["/embed"], "0", provider)(scope, None, send))  # type: ignore[arg-type]
    return list(exporter.get_finished_spans())


def root_and_stages(spans: list[ReadableSpan]) -> tuple[ReadableSpan, dict[str, list[ReadableSpan]]]:
    """The request's span, and by name those below it, which stand inside its time."""
    (root,) = [span for span in spans if span.name == "POST /embed"]
    stages = defaultdict(list)
    for span in spans:
        if span is not root:
            assert span.parent is not None
            assert span.parent.span_id == root.context.span_id
            assert root.start_time <= span.start_time <= span.end_time <= root.end_time
            stages[span.name].append(span)
    return root, stages


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("embedder."): value for name, value in (span.attributes or {}).items()}


def test_request_with_two_items_has_a_span_for_each_stage(engine: Engine) -> None:
    root, stages = root_and_stages(spans_of(engine, "a secret text", "another", headers=(TRACEPARENT,)))
    assert root.context.trace_id == TRACE_ID
    assert root.parent.span_id == PARENT_ID
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/embed",
        "url.path": "/embed",
        "http.response.status_code": 200,
        "items": 2,
        "tokens": 20,
    }
    assert set(stages) == {"wait_preprocess", "preprocess", "wait_device", "forward", "serialize"}
    of_item = {"item.kind": "text", "is_unfinished": False}
    assert [attributes(span) for span in stages["wait_device"]] == [{**of_item, "item.number": n} for n in (0, 1)]
    assert [attributes(span) for span in stages["preprocess"]] == [
        {**of_item, "item.number": 0, "tokens": 13, "visual_tokens": 0},
        {**of_item, "item.number": 1, "tokens": 7, "visual_tokens": 0},
    ]
    forward = [attributes(span) for span in stages["forward"]]
    assert sum(span["items"] for span in forward) == sum(span["batch.items"] for span in forward) == 2
    assert sum(span["batch.tokens"] for span in forward) == 20
    (serialize,) = stages["serialize"]
    assert serialize.start_time == max(span.end_time for span in stages["forward"])
    for preprocess, wait in zip(stages["preprocess"], stages["wait_device"], strict=True):
        assert preprocess.end_time == wait.start_time


def test_item_that_failed_in_preprocessing_goes_no_further(engine: Engine) -> None:
    root, stages = root_and_stages(spans_of(engine, "malformed"))
    assert set(stages) == {"wait_preprocess", "preprocess"}
    assert root.parent is None


def test_stage_that_outlives_its_request_ends_with_it(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    root, stages = root_and_stages(spans_of(engine, "runs", "waits", timeout_s=0.3))
    assert "forward" not in stages
    assert [attributes(span)["is_unfinished"] for span in stages["wait_device"]] == [True, True]
    assert root.status.status_code is StatusCode.ERROR
    assert attributes(root)["error.type"] == "504"


def test_large_request_has_spans_of_its_slowest_items(engine: Engine) -> None:
    root, stages = root_and_stages(spans_of(engine, *(f"text {index}" for index in range(100))))
    assert attributes(root)["items"] == 100
    assert len(stages["preprocess"]) == MAX_ITEMS_WITH_SPANS
    assert sum(attributes(span)["items"] for span in stages["forward"]) == 100


@pytest.mark.parametrize("options", [{"sampler": ALWAYS_OFF}, {"path": "/metrics"}])
def test_request_that_is_not_sampled_or_not_an_embedding_has_no_spans(engine: Engine, options: dict[str, Any]) -> None:
    assert spans_of(engine, "red", **options) == []


def test_without_the_exporter_nothing_is_traced_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert not is_traced()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert is_traced()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with caplog.at_level(logging.WARNING):
        assert not is_traced()
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set, but traces are not sent: install the extra `tracing`" in caplog.text


def test_collector_that_does_not_respond_delays_a_stop_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "LAST_SPANS_S", 0.01)
    responds = threading.Event()

    class Hanging(InMemorySpanExporter):
        def export(self, spans: Any) -> Any:
            responds.wait(30)
            return super().export(spans)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.shutdown.complete"})

    async def send(message: Any) -> None:
        sent.append(message["type"])

    sent: list[str] = []
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Hanging()))
    provider.get_tracer("test").start_span("POST /embed").end()
    asyncio.run(TracingMiddleware(app, ["/embed"], "0", provider)({"type": "lifespan"}, None, send))  # type: ignore[arg-type]
    assert sent == ["lifespan.shutdown.complete"]
    assert caplog.messages == ["the last spans are lost: they were not sent within 0.01 s of the stop"]
    responds.set()


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP collector: its address, and the bodies that it got."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()


@pytest.mark.slow
def test_service_sends_spans_without_content_in_the_callers_trace(
    collector: tuple[str, list[bytes]], random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, bodies = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu")
    headers = {"traceparent": TRACEPARENT[1].decode()}
    answer = httpx.post(f"{server.url}/embed", json={"items": ["a secret text", "red"]}, headers=headers, timeout=60)
    httpx.post(f"{server.url}/embed_texts", json={"texts": ["a secret text"]}, timeout=60)
    assert server.stop() == 0
    exports = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    resources = [resource for export in exports for resource in export.resource_spans]
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert answer.status_code == 200
    assert {span.trace_id.hex() for span in spans} == {f"{TRACE_ID:032x}"}
    names = [span.name for span in spans]
    assert set(names) == {"POST /embed", "wait_preprocess", "preprocess", "wait_device", "forward", "serialize"}
    assert names.count("preprocess") == 2
    services = [one.value.string_value for one in resources[0].resource.attributes if one.key == "service.name"]
    assert services == ["ours"]
    assert b"secret" not in b"".join(bodies)
