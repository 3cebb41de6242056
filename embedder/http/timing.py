"""Where the time of a request went, as response headers with the names of text-embeddings-inference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from embedder.engine.observer import ITEM_TRACES, ItemTrace


@contextmanager
def traced_items() -> Iterator[list[ItemTrace]]:
    """Yield the list that the traces of the items submitted inside the block are added to."""
    if (traces := ITEM_TRACES.get()) is not None:  # with tracing
        yield traces
        return
    traces = []
    token = ITEM_TRACES.set(traces)
    try:
        yield traces
    finally:
        ITEM_TRACES.reset(token)


def timing_headers(started_s: float, traces: Sequence[ItemTrace]) -> dict[str, str]:
    """Milliseconds since `started_s`; and per item, on average: preprocessing, waiting for the device, computing."""
    preprocessing = queueing = computing = 0.0
    for trace in traces:
        if trace.preprocess_started_s is None or trace.preprocess_ended_s is None:
            continue
        preprocessing += trace.preprocess_ended_s - trace.preprocess_started_s
        queueing += trace.preprocess_started_s - trace.admitted_s
        if trace.batch is not None:  # else from the cache
            queueing += max(0.0, trace.batch.started_s - trace.preprocess_ended_s)
            computing += trace.batch.seconds
    num_items = max(1, len(traces))
    return {
        "x-total-time": _milliseconds(time.monotonic() - started_s),
        "x-tokenization-time": _milliseconds(preprocessing / num_items),
        "x-queue-time": _milliseconds(queueing / num_items),
        "x-inference-time": _milliseconds(computing / num_items),
        "x-compute-tokens": str(sum([trace.num_tokens for trace in traces])),
    }


def _milliseconds(seconds: float) -> str:
    return str(round(1000 * seconds))
