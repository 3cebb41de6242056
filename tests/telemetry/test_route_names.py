"""Labels of metrics and names of spans are templates of paths."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Receive, Scope, Send

from embedder.http.routes import EMBEDDING_PATHS
from embedder.telemetry.metrics import Metrics
from embedder.telemetry.route_names import RouteNames
from embedder.telemetry.tracing import TracingMiddleware

INFER = "/v2/models/{model}/infer"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/txt/embed", "/txt/embed"),
        ("/txt/embed//", "/txt/embed"),
        ("/v2/models/any/infer", INFER),
        ("/v2/models/Qwen/Qwen3-VL-Embedding-2B/infer/", INFER),
        ("/v2/models/a\nb/infer", INFER),
        ("/v2/models//infer", None),
        ("/v2/models/any", None),
        ("/txt/embed/x", None),
        ("/", "/"),
        ("", None),
    ],
)
def test_path_has_the_name_of_its_template(path: str, expected: str | None) -> None:
    assert RouteNames(EMBEDDING_PATHS).of(path) == expected


def test_requests_to_a_template_are_counted_and_traced_under_its_name() -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    metrics = Metrics(EMBEDDING_PATHS)

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        metrics.http.begin()
        metrics.http.end(scope["path"], 200, 0.1, None)
        metrics.http.write()

    app = TracingMiddleware(count, EMBEDDING_PATHS, "1", provider)
    scope = {"type": "http", "method": "POST", "path": "/v2/models/any/infer", "headers": []}
    asyncio.run(app(scope, None, None))  # type: ignore[arg-type]
    assert f'embedder_requests_total{{route="{INFER}",status="200"}} 1.0' in metrics.exposition().decode()
    assert [(one.name, one.attributes["http.route"]) for one in spans.get_finished_spans()] == [  # type: ignore[index]
        (f"POST {INFER}", INFER)
    ]
