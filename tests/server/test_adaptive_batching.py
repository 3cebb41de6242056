"""BentoML's batchable APIs: rows of several requests in one batch, each request answered by itself."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence
from typing import Any

import bentoml
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Receive

from embedder import Reranker
from embedder.engine.callers import CALLER
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.dialects.dialect import ServedModel
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.http.openapi import RANKING_EXAMPLES
from embedder.http.routes import Routes, Serving
from embedder.playground.collection import Collection
from embedder.server.adaptive_batching import GatheredRows
from embedder.server.bento_app import RaisingErrors
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from tests.conftest import Server

QUERIES: list[dict[str, Any]] = [
    {"query": "a green car", "documents": ["The car is green.", "A bee on a flower.", "blue"]},
    {"query": "a bee", "documents": ["A bee on a flower."], "instruction": "Find insects."},
    {"query": "red", "documents": ["red", "The car is green."]},
]


def routes_over(reranker: Reranker, *, has_reranker: bool = True) -> Routes:
    routes = Routes(Settings(max_items_per_request=4), Metrics(()), version="0", needs_key=False)
    info = reranker.info()
    served = ServedModel("judge", 8192, info)
    models = (None, served) if has_reranker else (served, None)
    collection = Collection(Settings(), is_bundled_model=False)
    preprocessor = reranker.models.preprocessor
    routes.serving = Serving(reranker.engine, preprocessor, models[0], info, collection, 0.0, lambda: True, models[1])
    return routes


def app_over(routes: Routes) -> RequestBoundary:
    """As BentoML does it: another request's rows are in the same list, and each request gets its slice."""

    async def answer(request: Request) -> Response:
        rows = (await request.json())["queries"]
        response: Response = GatheredRows([QUERIES[1], *rows, {"query": ""}], routes.score_rows)[1 : 1 + len(rows)]
        return response

    bento_app = Starlette(routes=[Route("/rerank_queries", answer, methods=["POST"])])
    return RequestBoundary(RaisingErrors(bento_app), drain=Drain(), is_logged=False)


@pytest.fixture(scope="module")
def client(reranker: Reranker) -> TestClient:
    return TestClient(app_over(routes_over(reranker)), raise_server_exceptions=False)


def test_each_query_gets_the_librarys_scores_in_order(client: TestClient, reranker: Reranker) -> None:
    response = client.post("/rerank_queries", json={"queries": QUERIES[:2]})
    assert response.status_code == 200
    expected = [
        reranker.score(one["query"], one["documents"], instruction=one.get("instruction")) for one in QUERIES[:2]
    ]
    for scores, wanted in zip(response.json(), expected, strict=True):
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)
    raw = client.post("/rerank_queries", json={"queries": [{**QUERIES[0], "raw_scores": True}]}).json()
    np.testing.assert_allclose(1 / (1 + np.exp(-np.array(raw[0]))), expected[0], rtol=0, atol=1e-6)
    assert client.post("/rerank_queries", json=RANKING_EXAMPLES["queries"]).status_code == 200


@pytest.mark.parametrize(
    ("rows", "status", "item", "message"),
    [
        ([QUERIES[1], "red"], 400, 1, "got 'red' (a string); allowed: an object with query and documents"),
        ([QUERIES[1], {"query": "red"}], 400, 1, "documents: missing"),
        ([QUERIES[1], {"query": "", "documents": ["red"]}], 400, 1, "query: text is empty"),
        ([{"query": "red", "documents": ["red", {"image": "!"}]}], 400, 0, "document 1: image is not valid base64"),
        ([{"query": {"image": "iVBO"}, "documents": ["red"]}], 400, 0, "query: "),
        ([{"query": "red", "documents": ["red"], "top_n": 1}], 400, 0, "unknown field: top_n"),
        ([QUERIES[0], QUERIES[2]], 413, None, "got 5 items; allowed: 1 to 4 (EMBEDDER_MAX_ITEMS_PER_REQUEST)"),
    ],
)
def test_row_that_cannot_be_scored_says_which_and_why(
    rows: list[Any], status: int, item: int | None, message: str, client: TestClient
) -> None:
    response = client.post("/rerank_queries", json={"queries": rows})
    assert (response.status_code, response.json()["error"]["item"]) == (status, item)
    assert message in response.json()["error"]["message"]


def test_rows_are_computed_for_the_caller_who_has_sent_them() -> None:
    """BentoML gathers the rows of several callers in a context of its own."""
    callers: list[str] = []

    async def respond(_: Sequence[Any], __: Receive) -> Response:
        callers.append(CALLER.get())
        return Response()

    gathered = contextvars.Context().run(GatheredRows, ["a", "b", "c"], respond)
    app = Starlette(routes=[Route("/rows", lambda _: gathered[1:2], methods=["POST"])])
    guarded = RequestGuard(app, Settings(), keys=ApiKeys(Settings(api_key="one,two")), drain=Drain())
    client = TestClient(guarded)
    for key in ("one", "two", "one"):
        assert client.post("/rows", json={}, headers={"x-api-key": key}).status_code == 200
    assert callers[0] == callers[2] != callers[1]


def test_service_without_a_reranker_says_so(reranker: Reranker) -> None:
    client = TestClient(app_over(routes_over(reranker, has_reranker=False)), raise_server_exceptions=False)
    response = client.post("/rerank_queries", json={"queries": QUERIES[:1]})
    assert response.status_code == 404
    assert "the operator sets EMBEDDER_RERANKER" in response.json()["error"]["message"]


@pytest.mark.slow
def test_bentomls_clients_rank_with_the_service(reranking_server: Server, reranker: Reranker) -> None:
    wanted = [reranker.score(one["query"], one["documents"], instruction=one.get("instruction")) for one in QUERIES]
    with bentoml.SyncHTTPClient(reranking_server.url) as bento:
        scores = bento.rerank(queries=QUERIES)
        np.testing.assert_allclose(np.concatenate(scores), np.concatenate(wanted), rtol=0, atol=1e-6)
        with pytest.raises(bentoml.exceptions.BentoMLException, match="document 0: text is empty"):
            bento.rerank(queries=[{"query": "red", "documents": [""]}])

    async def rank_at_once() -> list[list[list[float]]]:
        async with bentoml.AsyncHTTPClient(reranking_server.url) as bento:
            return await asyncio.gather(*(bento.rerank(queries=[one]) for one in QUERIES))

    for (of_one,), expected in zip(asyncio.run(rank_at_once()), wanted, strict=True):
        np.testing.assert_allclose(of_one, expected, rtol=0, atol=1e-6)
