"""What responds to a worker's requests: the routes, and the middlewares around them and around BentoML's app.

The parent process, which responds to none, does not import this module: its imports take half a second of a start.
"""

from __future__ import annotations

from starlette.types import ASGIApp

from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.content_coding import CompressedResponses
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.http.playground_routes import OPEN_PATHS
from embedder.http.routes import EMBEDDING_PATHS, RERANKING_PATHS, UPLOAD_PATHS, Routes
from embedder.server.bento_app import RaisingErrors, with_api_page
from embedder.settings import Settings, metrics_folder
from embedder.telemetry.metrics import Metrics
from embedder.telemetry.request_metrics import MetricsMiddleware
from embedder.telemetry.tracing import TracingMiddleware, is_traced

APIS = ("/embed_texts", "/embed_images", "/rerank_queries")  # BentoML's own routes


class Application:
    """The routes, metrics and requests in progress of one worker."""

    def __init__(self, settings: Settings, keys: ApiKeys, version: str) -> None:
        self._settings = settings
        self._keys = keys
        self._version = version
        reranking = RERANKING_PATHS if settings.reranker else ()
        self.drain = Drain()
        self.metrics = Metrics((*EMBEDDING_PATHS, *APIS, *reranking), metrics_folder())
        self.routes = Routes(settings, self.metrics, version=version, needs_key=keys.are_needed)

    def around(self, bento_app: ASGIApp) -> ASGIApp:
        """The whole service: our routes and middlewares around BentoML's app."""
        app = self.routes.over(with_api_page(bento_app), RaisingErrors)
        app = RequestGuard(
            app,
            self._settings,
            keys=self._keys,
            drain=self.drain,
            open_paths=OPEN_PATHS,
            upload_paths=UPLOAD_PATHS,
            count_held_bytes=self.metrics.http.hold,
        )
        app = CompressedResponses(MetricsMiddleware(app, self.metrics.http))
        other_names = self.routes.other_names
        app = RequestBoundary(app, drain=self.drain, is_logged=self._settings.access_log, other_names=other_names)
        if is_traced():
            app = TracingMiddleware(app, (*EMBEDDING_PATHS, *RERANKING_PATHS, *other_names), self._version)
        return app
