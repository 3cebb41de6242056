"""Bodies of Cohere's route become items; vectors are written by type."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from embedder.engine.postprocess import Embedding, quantize
from embedder.errors import InvalidRequest, RequestTooLarge
from embedder.http.dialects.cohere import parse_cohere, parse_cohere_v1
from embedder.http.dialects.cohere_response import (
    CohereEmbedResponse,
    CohereRequest,
    CohereV1Response,
    cohere_response,
)
from embedder.http.dialects.dialect import ServedModel
from embedder.inputs.items import EmbeddingItem, Image, Text
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings
from tests.conftest import Server

SETTINGS = Settings(max_items_per_request=4)
URI = "data:image/png;base64,AAAA"


def parse(**fields: Any) -> CohereRequest:
    return parse_cohere(fields, SETTINGS)


def test_texts_images_and_inputs_are_items() -> None:
    assert parse(texts=["a", "b"]).items == (EmbeddingItem((Text("a"),)), EmbeddingItem((Text("b"),)))
    assert parse(images=[URI]).items == (EmbeddingItem((Image(URI),)),)
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": URI}}]
    assert parse(inputs=[{"content": content}]).items == (EmbeddingItem((Text("a"), Image(URI))),)


def test_options_have_coheres_names() -> None:
    request = parse(texts=["a"], model="x", input_type="search_query", output_dimension=64, truncate="NONE", priority=5)
    assert request.items == (EmbeddingItem((Text("a"),), QUERY_INSTRUCTION, 64, truncate="none"),)
    assert request.types == ("float",)
    for input_type in ("search_document", "classification", "clustering", "image"):
        assert parse(texts=["a"], input_type=input_type).items[0].instruction is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of `texts`, `images` and `inputs`; got none"),
        ({"texts": ["a"], "images": [URI]}, "give one of `texts`, `images` and `inputs`; got texts and images"),
        ({"texts": []}, "texts: got an empty list; allowed: at least one item"),
        ({"texts": "a"}, "texts: got 'a' (a string); input should be a valid list"),
        ({"texts": ["a", 5]}, "texts[1]: got 5 (a number); input should be a valid string"),
        ({"inputs": ["a"]}, "item 0: got 'a' (a string); allowed: an object with content"),
        ({"inputs": [{"content": []}]}, "item 0: an item needs at least one of text, image or video; got none"),
        ({"inputs": [{"text": "a"}]}, "item 0: unknown field: text"),
        ({"texts": ["a"], "embedding_types": ["float", "int4"]}, "embedding_types[1]: got 'int4' (a string); "),
        ({"texts": ["a", URI]}, "item 1: text: got a data URI with base64"),
        ({"texts": ["a"], "embedding_types": []}, "embedding_types: got an empty list"),
        ({"texts": ["a"], "truncate": "MIDDLE"}, "truncate: got 'MIDDLE' (a string); input should be 'NONE', "),
        ({"texts": ["a"], "max_tokens": 0}, "max_tokens: got 0; allowed: -1, or from 1 to 8192"),
        ({"texts": ["a"], "instruction": "b"}, "unknown field: instruction"),
    ],
)
def test_error_names_the_value_received_and_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert str(caught.value).startswith(message)


def test_too_many_items_are_refused() -> None:
    with pytest.raises(RequestTooLarge, match="got 5 items; allowed: 1 to 4"):
        parse(texts=list("abcde"))


def test_response_has_a_list_for_each_type_and_the_billed_units() -> None:
    kinds = ["base64", "float", "int8", "uint8", "binary", "ubinary", "float"]
    request = parse(
        inputs=[{"content": [{"type": "image", "image": URI}] * 2}, {"content": "b"}], embedding_types=kinds
    )
    vectors = np.eye(2, 8, dtype=np.float32)
    embeddings = [Embedding(vectors[0], 40, 0, num_visual_tokens=30), Embedding(vectors[1], 60, 5)]
    body = json.loads(cohere_response(request, embeddings, ServedModel("the model", 60)))
    CohereEmbedResponse.model_validate(body)
    assert list(body["embeddings"]) == kinds[:-1]
    assert body["embeddings"]["float"] == vectors.tolist()
    assert [
        np.frombuffer(base64.b64decode(one), "<f4").tolist() for one in body["embeddings"]["base64"]
    ] == vectors.tolist()
    for kind in ("int8", "uint8", "binary", "ubinary"):
        assert body["embeddings"][kind] == [quantize(vector, kind).tolist() for vector in vectors]
    assert body["response_type"] == "embeddings_by_type"
    assert len(body["id"]) == 36
    assert body["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": 70, "image_tokens": 30, "images": 2},
        "tokens": {"input_tokens": 100},
        "warnings": ["item 1: got 65 tokens; allowed: 60; its text was cut by 5 tokens"],
    }


def test_tokens_of_images_alone_are_image_tokens() -> None:
    request = parse(images=[URI])
    embedding = Embedding(np.eye(1, 8, dtype=np.float32)[0], 40, 0, num_visual_tokens=30)
    body = json.loads(cohere_response(request, [embedding], ServedModel("the model", 60)))
    assert body["meta"]["billed_units"] == {"input_tokens": 0, "image_tokens": 40, "images": 1}
    assert "texts" not in body


def test_first_version_has_plain_floats_unless_types_are_given() -> None:
    def answer(**fields: Any) -> dict[str, Any]:
        request = parse_cohere_v1(fields, SETTINGS)
        vector = np.array([0.6, 0.8], np.float32)
        body: dict[str, Any] = json.loads(cohere_response(request, [Embedding(vector, 22, 0)], ServedModel("m", 60)))
        CohereV1Response.model_validate(body)
        return body

    plain = answer(texts=["a"], input_type="search_query", truncate="END")
    assert plain["embeddings"] == [[0.6, 0.8]] or np.allclose(plain["embeddings"], [[0.6, 0.8]])
    assert (plain["response_type"], plain["texts"]) == ("embeddings_floats", ["a"])
    typed = answer(texts=["a"], embedding_types=["int8"])
    assert (typed["response_type"], list(typed["embeddings"])) == ("embeddings_by_type", ["int8"])
    assert answer(images=[URI])["texts"] == []


@pytest.mark.parametrize("path", ["/v1/embed", "/v1/rerank", "/v1/embeddings", "/v2/embed", "/v2/rerank"])
def test_message_of_an_error_is_where_clients_of_cohere_jina_and_voyage_read_it(path: str, server: Server) -> None:
    response = httpx.post(f"{server.url}{path}", content=b"red", headers={"content-type": "application/json"})
    body = response.json()
    assert response.status_code == (404 if "rerank" in path else 400)  # the service has no reranker
    assert body["message"] == body["detail"] == body["error"]["message"] != ""
