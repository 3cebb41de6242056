"""Files and batches of one worker, if the operator has chosen a folder for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from starlette.routing import Route

from embedder.http.batches.routes import BatchRoutes
from embedder.http.batches.runner import BatchRunner, Respond
from embedder.http.batches.store import BatchStore
from embedder.settings import Settings

logger = logging.getLogger(__name__)

SECONDS_PER_DAY = 86_400
BATCH_PRIORITY = 1000  # of their lines, at least: requests that arrive while lines run go first


class Batches:
    """The routes, and the task that runs batches. Without `EMBEDDER_BATCH_FOLDER` it has neither."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._task: asyncio.Task[None] | None = None
        self.routes: list[Route] = []
        if settings.batch_folder:
            retention_s = settings.batch_days * SECONDS_PER_DAY
            self._store = BatchStore(Path(settings.batch_folder), settings.max_batch_bytes, retention_s)
            endpoints = ["/v1/embeddings", *(["/v1/rerank"] if settings.reranker else [])]
            self.routes = BatchRoutes(self._store, endpoints).routes()

    def start(self, respond: Respond, num_pending: Callable[[], int], is_stopping: Callable[[], bool]) -> None:
        """Run batches in this event loop until the worker stops."""
        if self.routes:
            runner = BatchRunner(
                self._store, self._settings, respond=respond, num_pending=num_pending, is_stopping=is_stopping
            )
            self._task = asyncio.create_task(runner.run())
            self._task.add_done_callback(_log_unexpected_end)

    async def close(self) -> None:
        """Stop and cancel what runs; the lines that are not written yet run again later."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])


def _log_unexpected_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.critical("this worker runs no batches anymore", exc_info=error)
