"""Metrics of requests are gathered in the event loop, and written together."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from embedder.errors import Overloaded
from embedder.telemetry.metrics import Metrics
from embedder.telemetry.request_metrics import WRITTEN_AFTER_S, MetricsMiddleware


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(["/embed"])


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Of the one series with these labels."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    samples = [sample for family in families for sample in family.samples]
    (found,) = [one.value for one in samples if one.name == f"embedder_{name}" and one.labels == labels]
    return found


def counted(app: ASGIApp, metrics: Metrics, path: str = "/embed") -> Any:
    """A request to the app."""
    return MetricsMiddleware(app, metrics.http)({"type": "http", "path": path}, None, lambda _: asyncio.sleep(0))  # type: ignore[arg-type]


async def succeed(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})


def test_burst_is_written_once(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[float] = []
    monkeypatch.setattr(metrics.requests_in_progress, "set", written.append)

    async def run() -> None:
        await asyncio.gather(*(counted(succeed, metrics, path) for path in ("/embed", "/other") for _ in range(50)))
        assert not written
        metrics.http.write()
        metrics.http.write()  # nothing new
        await asyncio.sleep(2 * WRITTEN_AFTER_S)

    asyncio.run(run())
    assert written == [0]
    for route in ("/embed", "other"):
        assert value(metrics, "requests_total", route=route, status="200") == 50
        assert value(metrics, "request_duration_seconds_count", route=route) == 50


def test_written_soon_by_itself_also_after_a_pause(metrics: Metrics) -> None:
    async def run() -> None:
        for num_requests in (1, 2):
            await counted(succeed, metrics)
            await asyncio.sleep(5 * WRITTEN_AFTER_S)
            assert value(metrics, "requests_total", route="/embed", status="200") == num_requests

    asyncio.run(run())


def test_gauges_show_what_is_in_progress(metrics: Metrics) -> None:
    async def hold(scope: Scope, receive: Receive, send: Send) -> None:
        metrics.http.hold(100)
        metrics.http.write()
        assert value(metrics, "requests_in_progress") == 1
        assert value(metrics, "held_bytes") == 100
        metrics.http.hold(-100)

    async def run() -> None:
        await counted(hold, metrics)
        metrics.http.write()

    asyncio.run(run())
    assert value(metrics, "requests_in_progress") == value(metrics, "held_bytes") == 0


def test_errors_have_their_code_and_status(metrics: Metrics) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        raise Overloaded("full", retry_after_s=1)

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("a bug")

    async def lack(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def run() -> None:
        for app, kind in ((refuse, Overloaded), (fail, KeyError), (refuse, Overloaded), (lack, OSError)):
            with pytest.raises(kind):
                await counted(app, metrics)
        metrics.http.write()

    asyncio.run(run())
    assert value(metrics, "errors_total", code="overloaded") == 2
    assert value(metrics, "requests_total", route="/embed", status="429") == 2
    assert value(metrics, "requests_total", route="/embed", status="500") == 1
    assert value(metrics, "errors_total", code="system_limit") == 1
    assert value(metrics, "requests_total", route="/embed", status="503") == 1
