"""What the engine and the HTTP edge tell -> numbers for Prometheus, at `/metrics`; summed over the worker processes.

Every label has few values: a route is one that embeds or `other`, a status a number, a code one of `errors`. The texts
beside the names are the documentation: `python -m embedder.telemetry.metrics` prints them as the README's table.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from embedder.engine.observer import KINDS, Batch, ItemTrace, Observer
from embedder.errors import NO_ANSWER, EmbedderError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from embedder.engine.postprocess import Embedding
    from embedder.settings import Settings

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITEMS = tuple(2**power for power in range(10))  # 1 to 512
TOKENS = tuple(2**power for power in range(6, 18))  # 64 to 131072
FILE_BYTES = 2**17  # the largest, of the histograms, is filled to 56,144

Series = TypeVar("Series", Counter, Histogram)


class Metrics(Observer):
    """All metrics of this process. `folder` is where prometheus_client keeps those of all processes, if it does."""

    def __init__(self, routes: Collection[str], folder: str | None = None) -> None:
        self.routes = frozenset(routes)
        self._folder = folder
        self._registry = CollectorRegistry()
        if folder is not None:
            _make_files(Path(folder))
        self._define_requests()
        self._define_items()
        self._define_work()

    def _define_requests(self) -> None:
        self.requests = self._counter(
            "requests_total",
            "Requests answered, by `route` (`other`: all that do not embed) and `status` (499: the client went away).",
            "route",
            "status",
        )
        self.requests_in_progress = self._gauge("requests_in_progress", "Requests begun and not answered yet.")
        self.held_bytes = self._gauge("held_bytes", "Bytes of the bodies of requests begun and not answered yet.")
        self.held_limit = self._gauge("held_limit_bytes", "Bytes of bodies that may wait; more is refused (429).")
        request_seconds = self._histogram(
            "request_duration_seconds",
            "Time from a request's head to the end of its answer, by `route`.",
            SECONDS,
            "route",
        )
        self.request_seconds = _begin(request_seconds, [*self.routes, "other"])
        self.errors = self._counter("errors_total", "Requests answered with an error, by `code`.", "code")
        _begin(self.errors, _codes())

    def _define_items(self) -> None:
        items = self._counter("items_total", "Items taken into the queue, by `kind` of content.", "kind")
        self.items = _begin(items, KINDS)
        self.failed_items = self._counter(
            "failed_items_total", "Items that failed after that, alone or with their request, by `code`.", "code"
        )
        _begin(self.failed_items, _codes())
        self.cancelled_items = self._counter(
            "cancelled_items_total",
            "Items given up: their caller had gone, the time was over, or another item failed their request.",
        )
        self.cached_items = self._counter(
            "cached_items_total", "Items answered from `EMBEDDER_CACHE_BYTES`, or by an equal one that ran meanwhile."
        )
        self.cut_items = self._counter("cut_items_total", "Items embedded whose text was cut.")
        tokens = self._counter("tokens_total", "Tokens embedded, by `kind`: text or visual.", "kind")
        self.tokens = _begin(tokens, ["text", "visual"])
        self.prefix_tokens = self._counter(
            "prefix_tokens_total", "Of the text tokens, those of instructions: computed once, unless very many differ."
        )
        self.queue_items = self._gauge("queue_items", "Items taken and not answered yet.")
        self.queue_tokens = self._gauge("queue_tokens", "Their tokens, as estimated when they came.")
        self.queue_limit = self._gauge("queue_limit_tokens", "Estimated tokens that may wait; more is refused (429).")

    def _define_work(self) -> None:
        wait_seconds = self._histogram(
            "queue_wait_seconds",
            "Time an item waits, by `stage`: `preprocess` for a thread, then `device` for its batch to start.",
            SECONDS,
            "stage",
        )
        self.wait_seconds = _begin(wait_seconds, ["preprocess", "device"])
        preprocess_seconds = self._histogram(
            "preprocess_seconds", "Time a thread decodes, resizes and tokenizes one item, by `kind`.", SECONDS, "kind"
        )
        self.preprocess_seconds = _begin(preprocess_seconds, KINDS)
        self.forward_seconds = self._histogram("forward_seconds", "Time the device takes for a batch.", SECONDS)
        self.batch_items = self._histogram("batch_items", "Items that run together.", ITEMS)
        self.batch_tokens = self._histogram(
            "batch_tokens",
            "Tokens that run together as `EMBEDDER_MAX_BATCH_TOKENS` counts: visual ones also for the vision tower.",
            TOKENS,
        )
        self.threads = self._gauge("preprocess_threads", "Threads that preprocess, of all workers.")
        self.workers = self._gauge("workers", "Worker processes that are ready.")
        self.model = Gauge(
            "embedder_model_info",
            "Always 1, by `model`, `revision`, `device`, `dtype` and `version` of the service.",
            ["model", "revision", "device", "dtype", "version"],
            registry=self._registry,
            multiprocess_mode="livemax",
        )

    def serving(self, settings: Settings, info: Mapping[str, Any], version: str) -> None:
        """The worker is ready."""
        labels = {name: str(info[name] or "") for name in ("model", "revision", "device", "dtype")}
        self.model.labels(**labels, version=version).set(1)
        self.queue_limit.set(settings.max_queued_tokens)
        self.held_limit.set(settings.max_held_bytes)
        self.threads.set(settings.preprocess_threads)
        self.workers.set(1)

    def answered_request(self, path: str, status: int, seconds: float, code: str | None) -> None:
        """A request has its answer; `code` of one that is an error."""
        route = path if path in self.routes else "other"
        self.requests.labels(route, status).inc()
        self.request_seconds[route].observe(seconds)
        if code:
            self.errors.labels(code).inc()

    def admitted(self, trace: ItemTrace) -> None:
        self.items[trace.kind].inc()
        self.queue_items.inc()
        self.queue_tokens.inc(trace.estimated_tokens)

    def preprocessed(self, trace: ItemTrace) -> None:
        started_s, ended_s = trace.preprocess_started_s, trace.preprocess_ended_s
        assert started_s is not None
        assert ended_s is not None
        self.wait_seconds["preprocess"].observe(started_s - trace.admitted_s)
        self.preprocess_seconds[trace.kind].observe(ended_s - started_s)

    def ran(self, batch: Batch, traces: Sequence[ItemTrace]) -> None:
        for trace in traces:
            assert trace.preprocess_ended_s is not None
            self.wait_seconds["device"].observe(batch.started_s - trace.preprocess_ended_s)
        num_visual_tokens = sum(trace.num_visual_tokens for trace in traces)
        self.tokens["text"].inc(sum(trace.num_tokens for trace in traces) - num_visual_tokens)
        self.tokens["visual"].inc(num_visual_tokens)
        self.prefix_tokens.inc(sum(trace.num_prefix_tokens for trace in traces))
        self.cut_items.inc(sum(trace.num_cut_tokens > 0 for trace in traces))
        self.forward_seconds.observe(batch.seconds)
        self.batch_items.observe(batch.num_items)
        self.batch_tokens.observe(batch.num_tokens)

    def answered(self, trace: ItemTrace, future: Future[Embedding]) -> None:
        self.queue_items.dec()
        self.queue_tokens.dec(trace.estimated_tokens)
        if future.cancelled():
            self.cancelled_items.inc()
        elif isinstance(error := future.exception(), EmbedderError):
            self.failed_items.labels(error.code).inc()
        elif future.result().is_cached:
            self.cached_items.inc()

    def exposition(self) -> bytes:
        """What Prometheus scrapes, in its text format. Reads files: not for an event loop."""
        if self._folder is None:
            return generate_latest(self._registry)
        _forget_dead_processes(Path(self._folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, self._folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def table(self) -> str:
        """The metrics as a Markdown table, for the README: `python -m embedder.telemetry.metrics`."""
        rows = ["| metric | type | meaning |", "|---|---|---|"]
        for family in self._registry.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
        return "\n".join(rows)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"embedder_{name}", documentation, labels, registry=self._registry)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"embedder_{name}", documentation, labels, registry=self._registry, buckets=buckets)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        """One that is summed over the workers that live."""
        return Gauge(f"embedder_{name}", documentation, registry=self._registry, multiprocess_mode="livesum")


class MetricsMiddleware:
    """ASGI middleware around the edge: every answer, its time, and the code of one that is an error."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        status, body = NO_ANSWER, b""
        self.metrics.requests_in_progress.inc()

        async def watch(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status >= 400:
                body += message.get("body", b"")
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            self.metrics.requests_in_progress.dec()
            code = json.loads(body)["error"]["code"] if body else None  # the edge gives every error this shape
            self.metrics.answered_request(scope["path"], status, time.monotonic() - start, code)


def _begin(family: Series, values: Iterable[str]) -> dict[str, Series]:
    """The series of each value of a label, at 0: the first event is an increase, and alerts find what they ask for."""
    return {value: family.labels(value) for value in values}


def _codes(kind: type[EmbedderError] = EmbedderError) -> list[str]:
    """Of all errors there are."""
    return sorted({kind.code, *(code for child in kind.__subclasses__() for code in _codes(child))})


def _make_files(folder: Path) -> None:
    """The files of this process's numbers, before prometheus_client makes them, with holes: on a disk that is full by
    then, a write into one ends the process (SIGBUS). Here it is an OSError, and only at the start.
    """
    for kind in ("counter", "histogram", "gauge_livesum", "gauge_livemax"):
        (folder / f"{kind}_{os.getpid()}.db").write_bytes(bytes(FILE_BYTES))


def _forget_dead_processes(folder: Path) -> None:
    """A worker that was killed leaves its gauges behind; nobody else takes them away."""
    for pid in {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*_*.db")}:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    print(Metrics(()).table())
