"""Prometheus metrics of the engine and of HTTP requests, served at `/metrics` and summed over the worker processes.

Every label has few values: a route that embeds or ranks, or `other`, a status, an error code. The descriptions are the
documentation: `docs/generate.py` writes them to docs/reference/metrics.md.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from embedder.engine.observer import KINDS, Batch, ItemOutcome, ItemTrace, Kind, Observer
from embedder.engine.postprocess import Embedding
from embedder.errors import EmbedderError, error_classes
from embedder.inputs.decoder_process import EndReason
from embedder.telemetry.bulk_histogram import BulkHistogram
from embedder.telemetry.request_metrics import RequestMetrics
from embedder.telemetry.route_names import RouteNames

if TYPE_CHECKING:
    from embedder.settings import Settings

logger = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITEMS = tuple(2**power for power in range(10))  # 1 to 512
TOKENS = tuple(2**power for power in range(6, 18))  # 64 to 131072
FILE_BYTES = 2**17  # of each file; the largest, of the histograms, uses 56,144

Series = TypeVar("Series", Counter, BulkHistogram)


class Metrics(Observer):
    """All metrics of this process.

    `routes`, paths or templates, get a label of their own. `folder`: where prometheus_client keeps the values of all
    processes; None for a single process.
    """

    def __init__(self, routes: Collection[str], folder: str | None = None) -> None:
        self.routes = RouteNames(routes)
        self._folder = folder
        self._registry = CollectorRegistry()
        self._fault = _make_files(Path(folder)) if folder is not None else None
        if self._fault:
            self._folder = None
            values.ValueClass = values.MutexValue
        self._define_requests()
        self._define_items()
        self._define_work()
        self.http = RequestMetrics(self)

    def _define_requests(self) -> None:
        self.requests = self._counter(
            "requests_total",
            "Completed requests, by `route` (`other`: all routes that neither embed nor rank) and `status` (499: the "
            "client disconnected).",
            "route",
            "status",
        )
        self.requests_in_progress = self._gauge("requests_in_progress", "Requests in progress.")
        self.held_bytes = self._gauge("held_bytes", "Bytes of the bodies of requests in progress.")
        self.held_limit = self._gauge("held_limit_bytes", "Limit on `embedder_held_bytes`; above it, 429.")
        request_seconds = self._histogram(
            "request_duration_seconds",
            "Seconds from a request's head to the end of its response, by `route`.",
            SECONDS,
            "route",
        )
        self.request_seconds = _create_series(request_seconds, [*self.routes.templates, "other"])
        self.errors = self._counter("errors_total", "Requests that ended in an error, by `code`.", "code")
        _create_series(self.errors, _codes())

    def _define_items(self) -> None:
        items = self._counter("items_total", "Items admitted to the queue, by `kind` of content.", "kind")
        self.items = _create_series(items, KINDS)
        self.failed_items = self._counter("failed_items_total", "Admitted items that failed, by error `code`.", "code")
        _create_series(self.failed_items, _codes())
        self.cancelled_items = self._counter(
            "cancelled_items_total",
            "Admitted items that were dropped: the caller disconnected, the deadline passed, or their request failed.",
        )
        self.cached_items = self._counter(
            "cached_items_total",
            "Items whose vector came from the cache, or from an equal item that was computed at the same time.",
        )
        self.cut_items = self._counter("cut_items_total", "Embedded items whose text was cut to the limit.")
        tokens = self._counter("tokens_total", "Tokens embedded, by `kind`: text or visual.", "kind")
        self.tokens = _create_series(tokens, ["text", "visual"])
        self.prefix_tokens = self._counter(
            "prefix_tokens_total",
            "Text tokens in shared instruction prefixes, whose keys and values are computed once.",
        )
        self.queue_items = self._gauge("queue_items", "Admitted items that are not finished.")
        self.queue_tokens = self._gauge("queue_tokens", "Estimated tokens of the items in the queue.")
        self.queue_limit = self._gauge("queue_limit_tokens", "Limit on `embedder_queue_tokens`; above it, 429.")

    def _define_work(self) -> None:
        wait_seconds = self._histogram(
            "queue_wait_seconds",
            "Seconds an item waits, by `stage`: `preprocess` for a thread, then `device` for its batch to start.",
            SECONDS,
            "stage",
        )
        self.wait_seconds = _create_series(wait_seconds, ["preprocess", "device"])
        preprocess_seconds = self._histogram(
            "preprocess_seconds", "Seconds to decode, resize and tokenize one item, by `kind`.", SECONDS, "kind"
        )
        self.preprocess_seconds = _create_series(preprocess_seconds, KINDS)
        self.forward_seconds = self._histogram("forward_seconds", "Seconds the device takes for a batch.", SECONDS)
        self.batch_items = self._histogram("batch_items", "Items in a batch.", ITEMS)
        self.batch_tokens = self._histogram(
            "batch_tokens",
            "Tokens in a batch, counted as for `EMBEDDER_MAX_BATCH_TOKENS`: with the vision tower's work.",
            TOKENS,
        )
        vision_cache = self._counter(
            "vision_cache_total",
            "Images and clips that were looked up in the reranker's vision cache, by `result`: hit, or miss (encoded).",
            "result",
        )
        self.vision_cache = _create_series(vision_cache, ["hit", "miss"])
        replaced = self._counter(
            "decoders_replaced_total",
            "Decoding processes that were replaced, by `reason`: deadline, memory, crash.",
            "reason",
        )
        self.replaced_decoders = _create_series(replaced, get_args(EndReason))
        self.threads = self._gauge("preprocess_threads", "Preprocessing threads of all workers.")
        self.workers = self._gauge("workers", "Ready worker processes.")
        self.model = Gauge(
            "embedder_model_info",
            "Always 1, by `model`, `revision`, `device`, `dtype`, `weights` and `version` of the service.",
            ["model", "revision", "device", "dtype", "weights", "version"],
            registry=self._registry,
            multiprocess_mode="livemax",
        )

    def serving(self, settings: Settings, info: Mapping[str, Any], version: str) -> None:
        """Set the values that stay the same while the worker serves."""
        labels = {name: str(info[name] or "") for name in ("model", "revision", "device", "dtype", "weights")}
        self.model.labels(**labels, version=version).set(1)
        self.queue_limit.set(settings.max_queued_tokens)
        self.held_limit.set(settings.max_held_bytes)
        self.threads.set(settings.preprocess_threads)
        self.workers.set(1)
        if self._fault:
            logger.warning(
                "metrics files cannot be written (%s): /metrics has only the metrics of the worker that responds",
                self._fault,
            )

    def admitted(self, traces: Sequence[ItemTrace]) -> None:
        for kind, num_items in collections.Counter([trace.kind for trace in traces]).items():
            self.items[kind].inc(num_items)
        self.queue_items.inc(len(traces))
        self.queue_tokens.inc(sum([trace.estimated_tokens for trace in traces]))

    def ran(self, batch: Batch, traces: Sequence[ItemTrace]) -> None:
        waits_s = [batch.started_s - trace.preprocess_ended_s for trace in traces if trace.preprocess_ended_s]
        self.wait_seconds["device"].observe_all(waits_s)
        num_visual_tokens = sum([trace.num_visual_tokens for trace in traces])
        self.tokens["text"].inc(sum([trace.num_tokens for trace in traces]) - num_visual_tokens)
        if num_visual_tokens:
            self.tokens["visual"].inc(num_visual_tokens)
        self.prefix_tokens.inc(sum([trace.num_prefix_tokens for trace in traces]))
        if num_cut := sum([trace.num_cut_tokens > 0 for trace in traces]):
            self.cut_items.inc(num_cut)
        self.forward_seconds.observe(batch.seconds)
        self.batch_items.observe(batch.num_items)
        self.batch_tokens.observe(batch.num_tokens)

    def encoded(self, num_reused: int, num_encoded: int) -> None:
        self.vision_cache["hit"].inc(num_reused)
        self.vision_cache["miss"].inc(num_encoded)

    def resolved(self, outcomes: Sequence[tuple[ItemTrace, ItemOutcome]]) -> None:
        self.queue_items.dec(len(outcomes))
        self.queue_tokens.dec(sum([trace.estimated_tokens for trace, _ in outcomes]))
        waits_s: list[float] = []
        seconds: dict[Kind, list[float]] = {}
        for trace, outcome in outcomes:
            started_s, ended_s = trace.preprocess_started_s, trace.preprocess_ended_s
            if started_s is not None and ended_s is not None:
                waits_s.append(started_s - trace.admitted_s)
                seconds.setdefault(trace.kind, []).append(ended_s - started_s)
            if outcome is None:
                self.cancelled_items.inc()
            elif isinstance(outcome, EmbedderError):
                self.failed_items.labels(outcome.code).inc()
            elif isinstance(outcome, Embedding) and outcome.is_cached:
                self.cached_items.inc()
        self.wait_seconds["preprocess"].observe_all(waits_s)
        for kind, durations_s in seconds.items():
            self.preprocess_seconds[kind].observe_all(durations_s)

    def decoder_ended(self, reason: EndReason) -> None:
        self.replaced_decoders[reason].inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format. Reads files, so call it in a thread, after `http.write()`."""
        if self._folder is None:
            return generate_latest(self._registry)
        try:
            _touch_files(Path(self._folder))
        except FileNotFoundError:  # temporary files were deleted
            return generate_latest(self._registry)
        _forget_dead_processes(Path(self._folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, self._folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def table(self) -> str:
        """The metrics as a Markdown table, for docs/reference/metrics.md."""
        rows = ["| metric | type | meaning |", "|---|---|---|"]
        for family in self._registry.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
        return "\n".join(rows)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"embedder_{name}", documentation, labels, registry=self._registry)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float], *labels: str) -> BulkHistogram:
        return BulkHistogram(f"embedder_{name}", documentation, labels, registry=self._registry, buckets=buckets)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        """A gauge that is summed over the running workers."""
        return Gauge(f"embedder_{name}", documentation, registry=self._registry, multiprocess_mode="livesum")


def _create_series(family: Series, values: Iterable[str]) -> dict[str, Series]:
    """Create the series of each label value at 0, so that the first event is an increase that alerts can see."""
    return {value: family.labels(value) for value in values}


def _codes() -> list[str]:
    return sorted({kind.code for kind in error_classes()})


def _files(folder: Path) -> list[Path]:
    """The files of this process."""
    return [folder / f"{kind}_{os.getpid()}.db" for kind in ("counter", "histogram", "gauge_livesum", "gauge_livemax")]


def _make_files(folder: Path) -> OSError | None:
    """Create this process's files with all their bytes, before prometheus_client creates sparse ones.

    On a disk that is full, writing to a sparse file kills the process with SIGBUS. Here it is an error, returned.
    """
    try:
        for path in _files(folder):
            path.write_bytes(bytes(FILE_BYTES))
    except OSError as error:
        for path in _files(folder):
            path.unlink(missing_ok=True)
        return error
    return None


def _touch_files(folder: Path) -> None:
    """Set the times of this process's files to now: old files are often deleted from temporary folders."""
    for path in _files(folder):
        os.utime(path)


def _forget_dead_processes(folder: Path) -> None:
    """Remove the gauges of workers that were killed; prometheus_client would keep them."""
    for pid in {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*_*.db")}:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):  # another worker removed it first
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
