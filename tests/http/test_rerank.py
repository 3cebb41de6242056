"""The routes that score documents, inside this service's middlewares, over a random reranker."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import jsonschema_rs
import numpy as np
import pytest
from starlette.testclient import TestClient

from embedder import Embedder, Reranker
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.dialects.dialect import ServedModel
from embedder.http.dialects.rerank import RERANKING
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.http.routes import Routes, Serving
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.pairs import Query, pair_with
from embedder.models import Models
from embedder.playground.collection import Collection
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from tests.conftest import encoded, picture, words

TEXTS = ["The car is green.", "A bee on a flower.", words(40, 1)]
IMAGE = base64.b64encode(encoded(picture(64, 96, 3))).decode()
DATA_URI = f"data:image/png;base64,{IMAGE}"


@pytest.fixture(scope="module")
def models(random_checkpoint: Path, random_reranker: Path) -> Iterator[Models]:
    """An embedding model and a reranker with one engine."""
    models = Models(Settings(model=str(random_checkpoint), reranker=str(random_reranker), device="cpu"))
    yield models
    models.close()


@pytest.fixture(scope="module")
def client(models: Models) -> TestClient:
    return TestClient(app_of(models, embeds=True), raise_server_exceptions=False)


def app_of(models: Models, *, embeds: bool) -> RequestBoundary:
    routes = Routes(models.settings, Metrics(()), version="0", needs_key=False)
    collection = Collection(models.settings, is_bundled_model=False)
    info = models.info()
    model = ServedModel("embedding model", 8192, info) if embeds else None
    reranker = ServedModel("judge", 8192, info)
    serving = Serving(models.engine, models.preprocessor, model, info, collection, 0.0, lambda: True, reranker)
    routes.serving = serving
    drain = Drain()
    guard = RequestGuard(routes, models.settings, keys=ApiKeys(models.settings), drain=drain)
    return RequestBoundary(guard, drain=drain, is_logged=False)


def post(client: TestClient, path: str, body: Any, status: int = 200) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture(scope="module")
def scores(reranker: Reranker) -> list[float]:
    return reranker.score("a green car", TEXTS)


def check(results: list[dict[str, Any]], name: str, scores: list[float]) -> None:
    """The results are those of the library, the best first."""
    assert [one["index"] for one in results] == sorted(range(len(scores)), key=lambda index: -scores[index])
    assert {one["index"]: one[name] for one in results} == pytest.approx(dict(enumerate(scores)), abs=1e-6)


@pytest.mark.parametrize(
    ("path", "name"), [("/rerank", "score"), ("/v1/rerank", "relevance_score"), ("/v2/rerank", "relevance_score")]
)
def test_routes_give_the_scores_of_the_library(path: str, name: str, client: TestClient, scores: list[float]) -> None:
    body = post(client, path, {"model": "any", "query": "a green car", "documents": TEXTS})
    check(body["results"], name, scores)
    assert body["model"] == "judge"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] > 100


def test_rerank_has_the_score_under_the_name_of_vllm_and_infinity_too(client: TestClient) -> None:
    body = post(client, "/rerank", {"query": "a green car", "documents": TEXTS})
    assert body["id"].startswith("rerank-")
    assert all(one["relevance_score"] == one["score"] for one in body["results"])


def test_v1_response_has_what_voyages_client_reads(client: TestClient) -> None:
    body = {"model": "any", "query": "a green car", "documents": [*TEXTS, {"text": "blue"}], "truncation": True}
    response = post(client, "/v1/rerank", {**body, "top_k": None})
    assert response["object"] == "list"
    assert response["data"] == response["results"]
    assert len(response["data"]) == 4
    two = post(client, "/v1/rerank", {**body, "top_k": 2, "return_documents": True})
    assert [one["index"] for one in two["data"]] == [one["index"] for one in response["data"][:2]]
    assert all(one["document"] == body["documents"][one["index"]] for one in two["data"] if one["index"] < 3)
    assert "data" not in post(client, "/v2/rerank", {"query": "a green car", "documents": TEXTS})


def test_document_that_fails_fails_a_request_of_voyages_client(client: TestClient) -> None:
    documents = ["red", words(9000)]
    body = {"query": "red", "documents": documents}
    assert len(post(client, "/v1/rerank", {**body, "truncation": True})["data"]) == 2
    error = post(client, "/v1/rerank", {**body, "truncation": False}, 400)["error"]
    assert (error["code"], error["param"]) == ("input_too_long", "input[1]")
    assert [one["index"] for one in post(client, "/v1/rerank", {**body, "truncate": False})["errors"]] == [1]
    empty = post(client, "/v1/rerank", {"query": "red", "documents": ["red", ""], "truncation": True}, 400)
    assert empty["error"]["message"].startswith("item 1: text is empty")


def test_score_route_keeps_the_order_of_the_documents(client: TestClient, scores: list[float]) -> None:
    body = post(client, "/score", {"text_1": ["a green car"], "text_2": TEXTS})
    assert [one["score"] for one in body["data"]] == pytest.approx(scores, abs=1e-6)
    assert [one["index"] for one in body["data"]] == [0, 1, 2]
    one = post(client, "/score", {"queries": "a green car", "items": TEXTS[0]})
    assert [one["score"] for one in one["data"]] == pytest.approx(scores[:1], abs=1e-6)


def test_body_with_texts_is_answered_as_by_tei(client: TestClient, scores: list[float]) -> None:
    body = {"query": "a green car", "texts": TEXTS, "return_text": True}
    results = post(client, "/rerank", body)
    check(results, "score", scores)
    assert all(one["text"] == TEXTS[one["index"]] for one in results)
    raw = post(client, "/rerank", {**body, "raw_scores": True})
    assert min(one["score"] for one in raw) < 0 or max(one["score"] for one in raw) > 1
    assert post(client, "/rerank", {**body, "documents": None}) == results
    assert "results" in post(client, "/rerank", {"query": "a green car", "documents": TEXTS, "texts": None})
    too_long = {"query": "a", "texts": [words(9000)]}
    error = post(client, "/rerank", too_long, 400)
    assert error["error_type"] == "input_too_long"
    assert error["error"].startswith("item 0: ")
    assert post(client, "/rerank", {"query": 5, "texts": ["a"]}, 400)["error_type"] == "invalid_request"
    assert len(post(client, "/rerank", {**too_long, "truncate": True})) == 1
    assert [post(client, path, body) for path in ("/", "/invocations")] == [results, results]
    assert post(client, "/rerank", {**body, "top_n": 2}) == results[:2]
    assert post(client, "/rerank", {**body, "top_n": 0}) == results


def test_every_form_of_an_image_has_the_same_score(client: TestClient, reranker: Reranker) -> None:
    forms = [
        DATA_URI,
        {"image": IMAGE},
        {"content": [{"type": "image_url", "image_url": {"url": DATA_URI}}]},
        [{"type": "image", "image": IMAGE}],
        {"type": "image_url", "image_url": DATA_URI},
    ]
    (expected,) = reranker.score({"image": IMAGE}, [{"image": IMAGE}])
    for query in forms:
        body = post(client, "/v1/rerank", {"query": query, "documents": forms})
        assert [one["relevance_score"] for one in body["results"]] == pytest.approx([expected] * 5, abs=1e-6)


def test_options_of_a_request(client: TestClient, reranker: Reranker) -> None:
    body: dict[str, Any] = {"query": "a green car", "documents": [*TEXTS, {"text": "blue"}], "top_n": 2}
    whole = post(client, "/v2/rerank", {**body, "top_n": 0})["results"]
    assert [one["index"] for one in post(client, "/v2/rerank", body)["results"]] == [one["index"] for one in whole[:2]]
    echoed = post(client, "/v1/rerank", {**body, "return_documents": True})["results"]
    sent = [*({"text": text} for text in TEXTS), {"text": "blue"}]
    assert all(one["document"] == sent[one["index"]] for one in echoed)
    expected = reranker.score("a green car", body["documents"], instruction="Find cars.")
    for name in ("instruction", "instruct"):
        check(post(client, "/rerank", {**body, "top_n": None, name: "Find cars."})["results"], "score", expected)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_named_fields_of_documents_are_read_as_one_text_in_their_order(
    path: str, client: TestClient, reranker: Reranker
) -> None:
    documents = [{"title": "A bee", "text": "on a flower.", "year": 2026}, "red", {"text": "blue", "title": None}]
    fields = {"rank_fields": ["title", "text"], "max_chunks_per_doc": 10, "return_documents": True}
    results = post(client, path, {"query": "a green car", "documents": documents, **fields})["results"]
    expected = reranker.score("a green car", ["A bee\non a flower.", "red", "blue"])
    check(results, "relevance_score", expected)
    assert {one["index"]: one["document"] for one in results}[0] == documents[0]


def test_document_without_text_in_the_named_fields_says_so(client: TestClient) -> None:
    documents = ["red", {"year": 2026}, {"title": 5}]
    body = post(client, "/v2/rerank", {"query": "red", "documents": documents, "rank_fields": ["title"]})
    assert [(one["index"], one["message"]) for one in body["errors"]] == [
        (1, "got an object without the fields that rank_fields names; allowed: at least one of them"),
        (2, "title: got 5 (a number); allowed: a text, because rank_fields names it"),
    ]
    empty = post(client, "/v2/rerank", {"query": "red", "documents": documents, "rank_fields": []}, 400)["error"]
    assert empty["message"] == "rank_fields: got an empty list; allowed: at least one item"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/rerank", {"query": "a green car", "documents": TEXTS}),
        ("/score", {"text_1": "a green car", "text_2": TEXTS}),
    ],
)
def test_only_the_services_limit_can_be_asked_for_with_vllms_option(
    path: str, fields: dict[str, Any], client: TestClient
) -> None:
    """`vllm bench serve` and mteb's clients of vLLM send -1."""
    plain, with_limit = (post(client, path, {**fields, **option}) for option in ({}, {"truncate_prompt_tokens": -1}))
    assert {**plain, "id": ""} == {**with_limit, "id": ""}
    error = post(client, path, {**fields, "truncate_prompt_tokens": 10}, 400)["error"]
    assert "truncate_prompt_tokens: got 10 (a number); input should be -1" in error["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score"])
def test_vllms_option_turns_probabilities_into_log_odds(path: str, client: TestClient, scores: list[float]) -> None:
    fields = {"text_1" if path == "/score" else "query": "a green car"}
    fields |= {"text_2" if path == "/score" else "documents": TEXTS}

    def by_index(**options: Any) -> list[float]:
        body = post(client, path, {**fields, **options})
        results = sorted(body.get("results") or body["data"], key=lambda one: one["index"])
        return [one.get("relevance_score", one.get("score")) for one in results]

    for value in (None, True):
        assert by_index(use_activation=value) == pytest.approx(scores, abs=1e-6)
    log_odds = [math.log(score / (1 - score)) for score in scores]
    for name in ("use_activation", "activation", "softmax"):  # of newer and of older versions
        assert by_index(**{name: False}) == pytest.approx(log_odds, abs=1e-4)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score"])
def test_response_has_the_headers_with_times(path: str, client: TestClient) -> None:
    name = "text_2" if path == "/score" else "documents"
    answer = client.post(path, json={"query": "red", name: TEXTS})
    assert all(int(answer.headers[f"x-{part}-time"]) >= 0 for part in ("total", "tokenization", "queue", "inference"))
    assert int(answer.headers["x-compute-tokens"]) > 0


def test_document_is_cut_to_its_own_limit(client: TestClient) -> None:
    long, query = words(200, 9), "a green car"
    cut = post(client, "/v2/rerank", {"query": query, "documents": [long, "red"], "max_tokens_per_doc": 50})
    assert any("its text was cut by" in line for line in cut["warnings"])
    tokens = [
        post(client, "/v2/rerank", {"query": query, "documents": [text], "max_tokens_per_doc": limit})["usage"]
        for text, limit in ((long, 50), (long, 60), (long, None))
    ]
    assert tokens[1]["total_tokens"] - tokens[0]["total_tokens"] == 10
    assert tokens[2]["total_tokens"] > tokens[1]["total_tokens"] + 50


def test_of_100_documents_3_fail_and_97_have_scores(client: TestClient) -> None:
    bad: dict[int, Any] = {7: {"image": "no picture"}, 50: "", 99: {"txt": "red"}}
    documents = [bad.get(index, words(3, index)) for index in range(100)]
    for path in ("/rerank", "/v2/rerank"):
        body = post(client, path, {"query": "red", "documents": documents})
        assert sorted(one["index"] for one in body["results"]) == sorted(set(range(100)) - set(bad))
        assert [(one["index"], one["code"]) for one in body["errors"]] == [
            (7, "invalid_media"),
            (50, "invalid_request"),
            (99, "invalid_request"),
        ]
    error = post(client, "/score", {"text_1": "red", "text_2": documents}, 400)["error"]
    assert (error["item"], error["code"]) == (7, "invalid_media")
    body = post(client, "/rerank", {"query": "red", "documents": ["", {"image": "no picture"}]}, 400)
    assert body["error"]["code"] == "invalid_request"
    assert len(body["errors"]) == 2


def test_all_documents_in_one_content_get_a_message_that_says_so(client: TestClient) -> None:
    parts = [{"type": "text", "text": text} for text in TEXTS]
    error = post(client, "/v1/rerank", {"query": "red", "documents": {"content": parts}}, 400)["error"]
    assert error["message"].startswith("documents: got one object with 3 parts in `content`, which are one document;")
    body = post(client, "/v1/rerank", {"query": "red", "documents": [{"content": parts}]})
    assert body["warnings"][0].startswith("the only document has 3 parts, which are judged together;")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": {"image": "no picture"}, "documents": ["red"]}, "query: "),
        ({"query": "", "documents": ["red"]}, "query: text is empty"),
        ({"query": 1, "documents": ["red"]}, "query: got 1 (a number); allowed: a text, or an object"),
        ({"query": {"text": "red", "instruction": "Find."}, "documents": ["red"]}, "query: instruction: got 'Find.'"),
        ({"query": "red", "documents": []}, "documents: got an empty list"),
        ({"query": "red"}, "documents: missing"),
        ({"query": "red", "documents": ["red"], "topn": 1}, "unknown field: topn (did you mean top_n?)"),
        ({"query": "red", "documents": ["red"], "top_n": -1}, "top_n: got -1"),
        ({"query": "red", "documents": ["red"], "top_n": "1"}, "top_n: got '1' (a string)"),
        ({"query": "red", "documents": ["red"], "top_n": True}, "top_n: got true"),
    ],
)
def test_request_that_cannot_be_scored_says_why(body: Any, message: str, client: TestClient) -> None:
    assert message in post(client, "/rerank", body, 400)["error"]["message"]


def test_too_many_documents_are_refused(client: TestClient) -> None:
    error = post(client, "/rerank", {"query": "red", "documents": ["red"] * 2049}, 413)["error"]
    assert error["code"] == "request_too_large"


@pytest.mark.filterwarnings("ignore:You should not use the 'timeout' argument with the TestClient")
def test_coheres_client_reads_the_response(client: TestClient, scores: list[float]) -> None:
    sdk = cohere.ClientV2("key", base_url=str(client.base_url), httpx_client=client)
    answer = sdk.rerank(model="any", query="a green car", documents=TEXTS, top_n=2)
    best = sorted(range(3), key=lambda index: -scores[index])[:2]
    assert [one.index for one in answer.results] == best
    assert [one.relevance_score for one in answer.results] == pytest.approx([scores[i] for i in best], abs=1e-6)


def test_embeddings_are_those_of_a_service_without_a_reranker(client: TestClient, embedder: Embedder) -> None:
    vector = post(client, "/txt/embed", {"input": "red"})["embedding"]
    assert vector == pytest.approx(embedder.embed(["red"])[0].tolist(), abs=1e-6)
    models = client.get("/v1/models").json()["data"]
    assert [client.get(f"/v1/models/{one['id']}").json() for one in models] == models
    names = [one["id"] for one in models]
    assert names == ["embedding model", "judge"]
    info = client.get("/info").json()
    assert info["roles"] == ["embedder", "reranker"]
    assert info["reranker"]["default_instruction"].startswith("Given a search query")


def test_service_without_an_embedding_model_says_so(models: Models) -> None:
    error = post(TestClient(app_of(models, embeds=False)), "/txt/embed", {"input": "red"}, 404)["error"]
    assert error["message"] == "this service has no embedder: the operator sets EMBEDDER_MODEL"


def test_examples_of_the_openapi_document_are_answered_as_it_says(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for dialect in RERANKING:
        operation = document["paths"][dialect.path]["post"]
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        for example in dialect.examples.values():
            body = post(client, dialect.path, example)
            jsonschema_rs.validate({**schema, "components": document["components"]}, body)
            assert json.loads(json.dumps(body)) == body


def test_items_and_pairs_of_two_requests_share_a_batch(models: Models) -> None:
    embedding, reranking = models.embedder, models.reranker
    assert embedding is not None
    assert reranking is not None
    query = Query((Text("a green car"),), num_documents=2)
    prepared = reranking.preprocessor(query)
    pairs = [reranking.preprocessor(pair_with(query, prepared, EmbeddingItem((Text(text),)))) for text in TEXTS[:2]]
    items = [embedding.preprocessor(EmbeddingItem((Text(text),))) for text in TEXTS[:2]]
    rows = models._launch([items[0], pairs[0], pairs[1], items[1]])()
    assert [row.shape for row in rows] == [(192,), (1,), (1,), (192,)]
    alone = [*embedding.launch(items)(), *reranking.launch(pairs)()]
    for row, expected in zip([rows[0], rows[3], rows[1], rows[2]], alone, strict=True):
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
