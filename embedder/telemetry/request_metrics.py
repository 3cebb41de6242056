"""Counts HTTP requests. Their metrics are written together, a moment later.

A request changes seven values, and prometheus_client writes each change to a memory-mapped file.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from embedder.errors import CLIENT_CLOSED_REQUEST, EmbedderError, system_limit
from embedder.telemetry.route_names import named_path

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from embedder.telemetry.metrics import Metrics

WRITTEN_AFTER_S = 0.02


class RequestMetrics:
    """What requests have changed since the metrics were written. For the event loop only."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._num_in_progress = self._num_held_bytes = 0
        self._seconds: dict[str, list[float]] = {}  # of completed requests, by route
        self._statuses: list[tuple[str, int]] = []  # with their routes
        self._codes: list[str] = []  # of errors
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Count a request that arrived."""
        self._num_in_progress += 1
        self._write_soon()

    def hold(self, num_bytes: int) -> None:
        """Add to the bytes of bodies in progress; a negative number frees them."""
        self._num_held_bytes += num_bytes
        self._write_soon()

    def end(self, path: str, status: int, seconds: float, code: str | None) -> None:
        """Count a completed request. `code`: that of the error in which it ended, if any."""
        route = self._metrics.routes.of(path) or "other"
        self._num_in_progress -= 1
        self._statuses.append((route, status))
        self._seconds.setdefault(route, []).append(seconds)
        if code:
            self._codes.append(code)
        self._write_soon()

    def write(self) -> None:
        """Write what has changed to the metrics."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        metrics = self._metrics
        metrics.requests_in_progress.set(self._num_in_progress)
        metrics.held_bytes.set(self._num_held_bytes)
        for (route, status), num_requests in Counter(self._statuses).items():
            metrics.requests.labels(route, status).inc(num_requests)
        for route, seconds in self._seconds.items():
            metrics.request_seconds[route].observe_all(seconds)
        for code in self._codes:
            metrics.errors.labels(code).inc()
        self._statuses, self._seconds, self._codes = [], {}, []

    def _write_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITTEN_AFTER_S, self.write)


class MetricsMiddleware:
    """ASGI middleware: counts every response, its time, and the code of an error that is raised inside."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with _CountedRequest(self.metrics, named_path(scope)) as request:

            async def watch(message: Message) -> None:
                if message["type"] == "http.response.start":
                    request.status = message["status"]
                await send(message)

            await self.app(scope, receive, watch)


class _CountedRequest:
    """Context of one request; at its end the request is counted, with the error that ended it."""

    def __init__(self, metrics: RequestMetrics, path: str) -> None:
        self.status = CLIENT_CLOSED_REQUEST
        self._metrics = metrics
        self._path = path
        self._start_s = time.monotonic()

    def __enter__(self) -> _CountedRequest:
        self._metrics.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        code = None
        if isinstance(error, EmbedderError):
            self.status, code = error.status, error.code
        elif isinstance(error, Exception) and not isinstance(error, ClientDisconnect):
            raised = system_limit(error) or EmbedderError  # a bug
            self.status, code = raised.status, raised.code
        self._metrics.end(self._path, self.status, time.monotonic() - self._start_s, code)
