"""The BentoML service: its settings and image, its start and stop, and its adaptive-batching APIs.

The HTTP routes are in `embedder/http`, and what depends on BentoML's internals is in `embedder/server`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import embedder  # before torch: it sets the wait policy of torch's OpenMP  # isort: skip
import bentoml
from pydantic import AfterValidator

from embedder.errors import ModelUnavailable
from embedder.http.api_keys import ApiKeys
from embedder.http.batches.store import check_folder
from embedder.model.checkpoint import find_models
from embedder.model.gpus import count_gpus
from embedder.server.adaptive_batching import GatheredRows, check_rows, refuse_extra_fields
from embedder.server.bento_app import serve_inside
from embedder.server.bento_log import configure_logging
from embedder.server.lifecycle import (
    check_port,
    drain_at_sigterm,
    end_hanging_workers,
    exit_when_a_worker_fails_to_start,
    failing_start,
    handle_signals,
    keep_in_touch,
    refuse_start,
    replace_dead_workers_at_once,
    worker_server,
)
from embedder.settings import Settings, make_metrics_folder

if TYPE_CHECKING:
    from embedder.server.application import Application


try:
    SETTINGS = Settings.from_environment()
    KEYS = ApiKeys(SETTINGS)
except (ValueError, OSError) as error:
    refuse_start(error)

REQUIREMENTS = Path(__file__).with_name("deploy").joinpath("requirements.txt").read_text(encoding="utf-8")
NUM_GPUS = count_gpus()
# A thread that needs the GIL waits up to this long while another one runs Python code. The event loop acquires it about
# five times a request, and the device thread after each of a batch's several hundred operations, since PyTorch releases
# it during each. Python's default is 5 ms (`python -m benchmarks.choices`).
SWITCH_INTERVAL_S = 0.0002
IN_THE_IMAGE = "export BENTOML_HOME=/tmp/bentoml BENTOML_PORT=${AIP_HTTP_PORT:-${BENTOML_PORT:-3000}}"
BentoRows = Annotated[list[Any], AfterValidator(lambda rows: check_rows(rows, SETTINGS))]


@functools.cache
def application() -> Application:
    """What responds to the requests of this worker. The parent process has none: its imports take half a second."""
    from embedder.server.application import Application

    return Application(SETTINGS, KEYS, embedder.__version__)


@bentoml.service(
    name="qwen3-vl-embedding",
    workers=SETTINGS.num_workers(NUM_GPUS),
    resources={"gpu": max(1, NUM_GPUS)},  # requested from a scheduler: all GPUs of this machine
    traffic={"timeout": 2 * SETTINGS.request_timeout_s + 30},  # the engine's own deadlines come first
    logging={"access": {"enabled": False}},  # RequestBoundary writes one
    # BentoML's default image keeps compilers and installs the newest packages of the day.
    image=bentoml.images.Image(base_image="python:3.11-slim-bookworm", distro="", lock_python_packages=False)
    .run("install -d -o bentoml -g bentoml /cache && pip install --no-cache-dir uv==0.13.9")
    .build_include("deploy/requirements-cuda.txt")
    .python_packages(REQUIREMENTS)
    # BentoML's entrypoint reads this. The image's own BENTOML_HOME may be read-only; Vertex AI sets AIP_HTTP_PORT.
    .run(f"echo '{IN_THE_IMAGE}' >> /app/.venv/bin/activate"),
    tracing={"excluded_urls": ".*"},  # BentoML creates spans for each request even without an exporter
    metrics={"enabled": False},  # BentoML's have 20 series for every path that was ever requested
)
class Qwen3VLEmbedding:
    """Text, images and videos in, one vector per item out."""

    @bentoml.on_deployment
    @staticmethod
    def find_model() -> None:
        """Before the workers start, once: check the port and find the model, or exit with one line that says why."""
        configure_logging(SETTINGS.log_format)
        exit_when_a_worker_fails_to_start()
        handle_signals()
        replace_dead_workers_at_once()
        end_hanging_workers(SETTINGS.request_timeout_s)
        try:
            make_metrics_folder()
            check_port()
            check_folder(SETTINGS.batch_folder)
            is_bundled = find_models(SETTINGS)[0].is_bundled
            if SETTINGS.demo_folder:
                from embedder.playground.collection import Collection

                Collection(SETTINGS, is_bundled_model=is_bundled)
        except (ModelUnavailable, ValueError, OSError) as error:
            refuse_start(error)

    def __init__(self) -> None:
        configure_logging(SETTINGS.log_format)
        self.arbiter, self.is_ready = os.getppid(), False
        worker = (bentoml.server_context.worker_index or 1) - 1
        with failing_start():
            # the parent process does not need these, which take seconds
            from embedder.http.dialects.dialect import ServedModel
            from embedder.http.routes import Serving
            from embedder.models import Models
            from embedder.playground.collection import Collection

            self.app = application()
            self.models = Models(SETTINGS, worker=worker, observer=self.app.metrics, on_failure=self._exit)
        info = {**self.models.info(), "version": embedder.__version__}
        started_s = time.time() - time.monotonic()
        embedding, reranking = (
            ServedModel(one.checkpoint.name, SETTINGS.max_input_tokens, info, started_s) if one else None
            for one in (self.models.embedder, self.models.reranker)
        )
        engine, preprocessor = self.models.engine, self.models.preprocessor
        collection = Collection(SETTINGS, is_bundled_model=info["is_bundled_model"])
        self.app.routes.serving = Serving(
            engine, preprocessor, embedding, info, collection, time.time(), self.__is_ready__, reranking
        )

    @bentoml.on_startup
    async def warm_up(self) -> None:
        """Compute something real with each model; only then is the service ready."""
        with failing_start():
            await self.models.warm_up()
        gc.set_threshold(10_000)  # 64 requests in progress hold more objects than the usual 700
        gc.freeze()  # half a million objects that stay; a collection of them would stop all responses for 0.3 s
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if bentoml.server_context.worker_index:  # None if a program, not BentoML's arbiter, runs this
            from embedder.server.connection import bound_connections

            server = worker_server()
            bound_connections(server.config, SETTINGS.request_timeout_s)
            max_drain_s = 2 * SETTINGS.request_timeout_s  # for a body, and again for its items
            drain_at_sigterm(self.app.drain, server, max_drain_s)
            keep_in_touch(self.arbiter)
        self.is_ready = True
        self.app.metrics.serving(SETTINGS, self.models.info(), embedder.__version__)
        assert self.app.routes.serving is not None
        self.app.routes.run_batches(lambda: self.app.drain.is_draining)
        if self.models.embedder:
            collection = self.app.routes.serving.collection.build(self.models.engine)
            self.building = asyncio.create_task(collection)  # the loop itself keeps no reference to a task

    @bentoml.on_shutdown
    async def close(self) -> None:
        """Cancel the lines of batches, and finish the other items that were admitted."""
        self.is_ready = False
        await self.app.routes.stop_batches()
        self.app.routes.close()
        await asyncio.to_thread(self.models.close)

    def _exit(self, _: str) -> None:
        """Exit after the device has failed: only a new process can use it again."""
        self.is_ready = False
        threading.Timer(1.0, os._exit, (1,)).start()  # after the responses are sent

    def __is_ready__(self) -> bool:
        return self.is_ready and not self.app.drain.is_draining

    # The engine decides what runs together, so BentoML only gathers: these limits never split or drop a batch.
    @bentoml.api(batchable=True, max_batch_size=1_000_000, max_latency_ms=3_600_000)
    async def embed_texts(self, texts: BentoRows) -> list[list[float]]:
        """One vector per text. A text is a string, or an object with `text`, `instruction`, `dimensions`."""
        return GatheredRows(
            ({"text": row} if isinstance(row, str) else row for row in texts), self.app.routes.embed_rows
        )

    @bentoml.api(batchable=True, max_batch_size=1_000_000, max_latency_ms=3_600_000)
    async def embed_images(self, images: BentoRows) -> list[list[float]]:
        """One vector per image. An image is base64, or an object with `image`, `instruction`, `dimensions`."""
        return GatheredRows(
            ({"image": row} if isinstance(row, str) else row for row in images), self.app.routes.embed_rows
        )

    @bentoml.api(route="/rerank_queries", batchable=True, max_batch_size=1_000_000, max_latency_ms=3_600_000)
    async def rerank(self, queries: BentoRows) -> list[list[float]]:
        """The scores of each query's documents. A query is an object with `query`, `documents`, `instruction`."""
        return GatheredRows(queries, self.app.routes.score_rows)


for _api in Qwen3VLEmbedding.apis.values():  # type: ignore[attr-defined]  # the decorator made a Service of it
    refuse_extra_fields(_api)
serve_inside(Qwen3VLEmbedding, lambda bento_app: application().around(bento_app))
