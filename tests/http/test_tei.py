"""The bodies of text-embeddings-inference's clients on `/`, `/invocations`, `/embed` and `/similarity`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from embedder import Embedder
from tests.conftest import Server

SAME = 1e-6  # float32, one content in two batches
SENTENCES = ["crimson", "a dog"]


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.mark.parametrize("path", ["/", "/invocations", "/embed"])
def test_body_with_inputs_gets_vectors_on_every_path_of_tei(path: str, http: httpx.Client, embedder: Embedder) -> None:
    expected = np.stack(embedder.embed(["red", "green"]))
    options = {"truncate": True, "normalize": True, "encoding_format": "float", "options": {"wait_for_model": True}}
    both = http.post(path, json={"inputs": ["red", "green"], **options})
    one = http.post(path, json={"inputs": "red"})
    np.testing.assert_allclose(both.json(), expected, rtol=0, atol=SAME)
    np.testing.assert_allclose(one.json(), expected[:1], rtol=0, atol=SAME)


@pytest.mark.parametrize("path", ["/", "/invocations", "/embed", "/similarity"])
def test_body_with_a_source_sentence_gets_similarities(path: str, http: httpx.Client, embedder: Embedder) -> None:
    source, *others = embedder.embed(["red", *SENTENCES])
    body = {"inputs": {"source_sentence": "red", "sentences": SENTENCES}, "options": {"use_cache": False}}
    np.testing.assert_allclose(http.post(path, json=body).json(), [source @ one for one in others], rtol=0, atol=SAME)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/", {"inputs": ["red", ""]}, "item 1: text is empty"),
        ("/", {"inputs": "red", "encoding_format": "base64"}, "encoding_format: got 'base64'"),
        ("/", {"input": "red"}, "unknown field: input (did you mean inputs?)"),
        ("/invocations", {"inputs": ["red", ""]}, "item 1: text is empty"),
        ("/", {"inputs": {"source_sentence": "red"}}, "inputs.sentences: missing"),
    ],
)
def test_errors_have_the_form_of_tei(path: str, body: Any, message: str, http: httpx.Client) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"].startswith(message)
    assert response.json()["error_type"] == "invalid_request"


def test_body_to_rank_needs_a_reranker(http: httpx.Client) -> None:
    response = http.post("/", json={"query": "red", "texts": ["red"]})
    assert (response.status_code, response.json()["error_type"]) == (404, "not_found")
    assert response.json()["error"] == "this service has no reranker: the operator sets EMBEDDER_RERANKER"


def test_root_is_still_a_page_for_browsers(http: httpx.Client) -> None:
    page = http.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert http.head("/").status_code == 200
    refused = http.delete("/")
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_only_bodies_for_the_root_are_counted_under_its_name(http: httpx.Client) -> None:
    for _ in range(2):
        http.get("/")
        http.post("/", json={"inputs": "red"})
    lines = http.get("/metrics").text.splitlines()
    (counted,) = [line for line in lines if line.startswith('embedder_requests_total{route="/",status="200"}')]
    posted = float(counted.rpartition(" ")[2])
    http.get("/")
    assert f'embedder_requests_total{{route="/",status="200"}} {posted}' in http.get("/metrics").text.splitlines()


def test_huggingfaces_client_embeds_and_compares_with_the_service_as_its_base_url(
    server: Server, embedder: Embedder
) -> None:
    client = InferenceClient(base_url=server.url)
    red, *others = embedder.embed(["red", *SENTENCES])
    vectors = client.feature_extraction("red", normalize=True, truncate=True, encoding_format="float")
    np.testing.assert_allclose(vectors, [red], rtol=0, atol=SAME)
    similarities = client.sentence_similarity("red", other_sentences=SENTENCES)
    np.testing.assert_allclose(similarities, [red @ other for other in others], rtol=0, atol=SAME)
    with pytest.raises(HfHubHTTPError, match="text is empty"):
        client.feature_extraction("")
