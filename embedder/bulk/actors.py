"""The missing parts of a run, distributed over Ray actors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from embedder.bulk.formats import Part
from embedder.bulk.worker import PARTS_AT_ONCE, Job, Worker, share_resources

OBJECT_STORE_BYTES = 80 * 2**20  # about Ray's minimum; only counts pass through it
LOCAL_STARTS = 2  # Ray gives its processes 30 seconds, which is short on a busy machine


def run_parts(job: Job, parts: Sequence[Part], address: str | None) -> Iterator[dict[str, Any]]:
    """Embed the parts. Yields the counts of each part when it is finished. Raises `ConnectionError` if Ray fails."""
    try:
        yield from _run_parts(job, parts, address)
    except ray.exceptions.RayError as error:
        raise ConnectionError(str(error)) from error


def _run_parts(job: Job, parts: Sequence[Part], address: str | None) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray reports each of its steps, between the lines of the progress bar. The command reports what fails.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if address:
        ray.init(address, logging_level=logging.ERROR)
    else:
        _start_on_this_machine()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # polling the memory of each worker every second takes time
    alive = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive if node["Alive"] and node["Resources"].get("CPU")]
    gpus = 0 if job.settings.device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
    num_workers, resources = share_resources(job.settings, gpus, [int(node["CPU"]) for node in nodes])
    try:
        items = ray.data.from_items([{"part": part.to_json()} for part in parts], override_num_blocks=len(parts))
        counted = items.map(
            Worker,  # type: ignore[arg-type]  # Ray turns the class into actors
            fn_constructor_args=(job,),
            compute=ActorPoolStrategy(
                size=num_workers, max_concurrent_calls_per_actor=PARTS_AT_ONCE, enable_true_multi_threading=True
            ),
            **resources,
        )
        yield from counted.iter_rows()
    finally:
        ray.shutdown()


def _start_on_this_machine() -> None:
    """Start Ray here. Raises `ConnectionError` if its processes do not answer in time."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 lets other programs go first
    for remaining in reversed(range(LOCAL_STARTS)):
        try:
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises a bare `Exception`; its processes end together with this one
            if not remaining:
                raise ConnectionError(f"Ray did not start: {error}") from error
        else:
            return
