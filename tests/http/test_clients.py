"""The ecosystem's own clients, unchanged, get the library's vectors; every response matches the OpenAPI document."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import cohere
import httpx
import jsonschema_rs
import numpy as np
import openai
import PIL.Image
import pytest

from embedder import Embedder
from embedder.errors import NotFound
from embedder.http.dialects import dashscope, kserve
from embedder.http.routes import EXAMPLES
from embedder.inputs.items import item_from_fields
from embedder.inputs.prompt import QUERY_INSTRUCTION
from tests.conftest import Server, encoded, picture, words

SAME = 1e-6  # float32, one content on two routes or in two batches
TEXTS = ["red", "a green circle", "\u7d05\u8272", words(60)]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


PNG = encoded(picture(70, 50))


def assert_same(vectors: Any, expected: Any) -> None:
    assert np.abs(np.array(vectors, np.float32) - np.stack(expected)).max() <= SAME


@pytest.fixture
def openai_client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def cohere_client(server: Server) -> Iterator[cohere.ClientV2]:
    with httpx.Client(timeout=60) as http:  # the client's own is never closed
        yield cohere.ClientV2(api_key="none", base_url=server.url, max_retries=0, httpx_client=http)


def test_openai_client_gets_the_librarys_vectors(openai_client: openai.OpenAI, embedder: Embedder) -> None:
    expected = embedder.embed(TEXTS)
    as_base64 = openai_client.embeddings.create(model="any", input=TEXTS)  # the client asks for base64 by itself
    as_floats = openai_client.embeddings.create(model="any", input=TEXTS, encoding_format="float", user="me")
    for answer in (as_base64, as_floats):
        assert_same([one.embedding for one in answer.data], expected)
        assert [one.index for one in answer.data] == [0, 1, 2, 3]
        assert answer.model == embedder.checkpoint.name
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 60
    (single,) = openai_client.embeddings.create(model="any", input="red", dimensions=64).data
    assert_same([single.embedding], embedder.embed(["red"], dimensions=64))


def test_openai_client_sends_pictures_and_options_in_extra_body(
    openai_client: openai.OpenAI, embedder: Embedder
) -> None:
    content = [{"type": "text", "text": "a swatch: "}, {"type": "image_url", "image_url": {"url": data_uri(PNG)}}]
    inputs: Any = [data_uri(PNG), {"image": b64(PNG)}, {"content": content}]
    answer = openai_client.embeddings.create(model="any", input=inputs, extra_body={"instruction": "Find it."})
    both = {"content": [{"type": "text", "text": "a swatch: "}, {"type": "image", "image": PNG}]}
    expected = embedder.embed([{"image": PNG}, {"image": PNG}, both], instruction="Find it.")
    assert_same([one.embedding for one in answer.data], expected)


def test_async_openai_client_gets_the_librarys_vectors(server: Server, embedder: Embedder) -> None:
    async def embed_all() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="any", input=text) for text in TEXTS),
                *(client.embeddings.create(model="any", input=text, encoding_format="float") for text in TEXTS),
            )
        return [answer.data[0].embedding for answer in answers]

    assert_same(asyncio.run(embed_all()), embedder.embed(TEXTS) * 2)


def test_openai_client_lists_the_model(openai_client: openai.OpenAI, embedder: Embedder) -> None:
    (model,) = openai_client.models.list().data
    assert model.id == embedder.checkpoint.name
    assert model.model_extra == {"max_model_len": 8192, "root": model.id, "parent": None}


def test_openai_client_raises_the_services_error(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        openai_client.embeddings.create(model="any", input=["red", ""])
    assert (failure.value.code, failure.value.param, failure.value.type) == (
        "invalid_request",
        "input[1]",
        "invalid_request_error",
    )
    assert "item 1: text is empty; allowed: at least one character" in str(failure.value)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        openai_client.embeddings.create(model="any", input=[[1, 2, 3]])
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="any", messages=[{"role": "user", "content": "hello"}])


def test_cohere_client_gets_the_librarys_vectors(cohere_client: cohere.ClientV2, embedder: Embedder) -> None:
    answer = cohere_client.embed(
        model="any", texts=TEXTS, input_type="search_document", embedding_types=["float", "base64"]
    )
    expected = embedder.embed(TEXTS)
    assert answer.embeddings.float_ is not None
    assert answer.embeddings.base64 is not None
    assert_same(answer.embeddings.float_, expected)
    assert_same([np.frombuffer(base64.b64decode(one), "<f4") for one in answer.embeddings.base64], expected)
    assert answer.meta is not None
    assert answer.meta.billed_units is not None
    num_tokens = [embedder.preprocessor(item_from_fields({"text": text})).num_tokens for text in TEXTS]
    assert answer.meta.billed_units.input_tokens == sum(num_tokens)
    assert answer.response_type == "embeddings_by_type"


def test_cohere_client_sends_pictures_mixtures_and_queries(cohere_client: cohere.ClientV2, embedder: Embedder) -> None:
    images = cohere_client.embed(model="any", images=[data_uri(PNG)], input_type="image")
    assert_same(images.embeddings.float_, embedder.embed([{"image": PNG}]))
    assert images.meta is not None
    assert images.meta.billed_units is not None
    assert images.meta.billed_units.images == 1
    both = {
        "content": [
            {"type": "image_url", "image_url": {"url": data_uri(PNG)}},
            {"type": "text", "text": "a swatch"},
        ]
    }
    mixed = cohere_client.embed(model="any", inputs=[both], input_type="search_query", output_dimension=64)  # type: ignore[list-item]
    content = [{"type": "image", "image": PNG}, {"type": "text", "text": "a swatch"}]
    expected = embedder.embed([{"content": content}], instruction=QUERY_INSTRUCTION, dimensions=64)
    assert_same(mixed.embeddings.float_, expected)


def test_cohere_client_gets_every_type(cohere_client: cohere.ClientV2, embedder: Embedder) -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary"]
    embeddings = cohere_client.embed(
        model="any", texts=["red"], input_type="search_document", embedding_types=kinds
    ).embeddings
    (vector,) = embedder.embed(["red"])
    assert embeddings.int8 is not None
    assert embeddings.uint8 is not None
    assert embeddings.binary is not None
    assert embeddings.ubinary is not None
    int8 = np.array(embeddings.int8[0])
    assert int8 @ vector / np.linalg.norm(int8) == pytest.approx(1, abs=1e-3)
    assert np.array_equal(np.array(embeddings.uint8[0]) - 128, int8)
    assert np.array_equal(np.array(embeddings.binary[0]) + 128, embeddings.ubinary[0])
    assert np.array_equal(np.unpackbits(np.array(embeddings.ubinary[0], np.uint8)), vector > 0)
    assert embeddings.base64 is None


def test_cohere_client_raises_the_services_error(cohere_client: cohere.ClientV2) -> None:
    with pytest.raises(cohere.BadRequestError, match="dimensions: got 5000"):
        cohere_client.embed(model="any", texts=["red"], input_type="search_document", output_dimension=5000)


HUGE = "x" * 200_001
LONG_SIDE = PIL.Image.new("1", (9000, 9000))  # 81 million pixels in few bytes
TEXT, IMAGE = {"type": "text", "text": "a swatch: "}, {"type": "image", "image": b64(PNG)}


def test_64_mixed_items_of_which_7_are_bad(client: httpx.Client, embedder: Embedder) -> None:
    bad: dict[int, tuple[Any, str]] = {
        0: ({"text": ""}, "invalid_request"),
        9: ({"image": "it's red"}, "invalid_media"),
        20: ({"text": "a", "dimensions": 5}, "unsupported_dimensions"),
        21: (5, "invalid_request"),
        40: ({"text": HUGE}, "input_too_long"),
        50: ({"image": b64(encoded(LONG_SIDE))}, "media_too_large"),
        63: ({"txt": "a"}, "invalid_request"),
    }
    kinds: list[Any] = [
        lambda index: words(1 + index, index),
        lambda index: {"image": b64(encoded(picture(40 + index, 60, index)))},
        lambda index: {"content": [TEXT, IMAGE, {"type": "text", "text": str(index)}], "instruction": "Find."},
        lambda index: {"text": str(index), "dimensions": 64 + index},
    ]
    good = {index: kinds[index % 4](index) for index in range(64) if index not in bad}
    items = [bad[index][0] if index in bad else good[index] for index in range(64)]
    named = [{**item, "id": f"item {index}"} if isinstance(item, dict) else item for index, item in enumerate(items)]
    response = client.post("/embed", json={"items": named})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["index"] for result in results] == list(range(64))
    assert [result.get("id") for result in results] == [
        f"item {index}" if isinstance(item, dict) else None for index, item in enumerate(items)
    ]
    assert {index: result["error"]["code"] for index, result in enumerate(results) if "error" in result} == {
        index: code for index, (_, code) in bad.items()
    }
    expected = dict(zip(good, embedder.embed(good.values()), strict=True))
    assert len(expected) == 57
    for index, vector in expected.items():
        assert np.abs(np.array(results[index]["embedding"], np.float32) - vector).max() <= SAME


def test_request_in_which_every_item_is_bad_has_the_status_of_its_first_error(client: httpx.Client) -> None:
    large = {"image": b64(encoded(LONG_SIDE))}
    response = client.post("/embed", json={"items": [large, ""]})
    assert response.status_code == 413
    body = response.json()
    assert body["error"]["code"] == "media_too_large"
    assert [result["error"]["code"] for result in body["results"]] == ["media_too_large", "invalid_request"]
    assert client.post("/embed", json={"items": ["", large]}).status_code == 400


EVERY_EXAMPLE = [(path, name) for path, examples in EXAMPLES.items() for name in examples]


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return document


def assert_is_as_described(document: dict[str, Any], response: httpx.Response, path: str, method: str) -> None:
    """The document has the response's status, and its schema for that status accepts the body."""
    answers = document["paths"][path][method]["responses"]
    schema = answers[str(response.status_code)]["content"]["application/json"]["schema"]
    jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]}).validate(response.json())


@pytest.mark.parametrize(("path", "name"), EVERY_EXAMPLE)
def test_response_to_each_example_matches_the_document(
    path: str, name: str, client: httpx.Client, document: dict[str, Any]
) -> None:
    response = client.post(path, json=EXAMPLES[path][name])
    assert response.status_code == 200, response.text
    assert_is_as_described(document, response, path, "post")


@pytest.mark.parametrize("path", EXAMPLES)
def test_errors_match_the_document(path: str, client: httpx.Client, document: dict[str, Any]) -> None:
    many = ["a"] * 2049
    too_many: dict[str, dict[str, Any]] = {
        "/embed": {"items": many},
        "/v2/embed": {"texts": many},
        "/v1/embed": {"texts": many},
        "/v1/multimodalembeddings": {"inputs": many},
        "/predict": {"instances": many},
        "/similarity": {"inputs": {"source_sentence": "a", "sentences": many}},
        "/": {"inputs": many},
        "/tokenize": {"items": many},
        "/v2/models/{model}/infer": {"inputs": [{"name": "text", "shape": [2049], "datatype": "BYTES", "data": many}]},
        dashscope.PATH: {"input": {"contents": many}},
    }
    responses = {
        "unknown field": client.post(path, json={"instrction": "a"}),
        "not JSON": client.post(path, content=b"{"),
        "content type": client.post(
            path, content=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}
        ),
        "too many": client.post(path, json=too_many.get(path, {"input": many})),
    }
    expected = {"unknown field": 400, "not JSON": 400, "content type": 415, "too many": 413}
    is_single = path in ("/api/embeddings", "/detokenize", "/decode")  # these take no list of items
    if is_single or path.startswith("/embed_"):  # BentoML's own routes: rows have no limit
        del responses["too many"]
    for name, response in responses.items():
        assert response.status_code == expected[name], (name, response.text)
        assert_is_as_described(document, response, path, "post")


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/info"])
def test_response_to_get_matches_the_document(path: str, client: httpx.Client, document: dict[str, Any]) -> None:
    assert_is_as_described(document, client.get(path), path, "get")


@pytest.mark.parametrize("model", ["any", "Qwen/Qwen3-VL-Embedding-2B", "a%0Ab"])
def test_path_of_inference_is_no_model_name(model: str, client: httpx.Client) -> None:
    assert client.get(f"/v2/models/{model}").json()["name"]
    assert client.get(f"/v2/models/{model}/ready").status_code == 200
    body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["red"]}]}
    assert client.post(f"/v2/models/{model}/infer", json=body).status_code == 200
    refused = client.get(f"/v2/models/{model}/infer")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("model", ["any", "Qwen/Qwen3-VL-Embedding-2B"])
def test_version_1_is_the_only_version_of_a_model(model: str, client: httpx.Client) -> None:
    body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["red"]}]}
    for version, status in (("1", 200), ("2", 404), ("10", 404)):
        path = f"/v2/models/{model}/versions/{version}"
        responses = [client.get(path), client.get(f"{path}/ready"), client.post(f"{path}/infer", json=body)]
        assert [response.status_code for response in responses] == [status] * 3
        if status == 404:
            assert all(isinstance(response.json()["error"], str) for response in responses)


@pytest.mark.parametrize("page", ["config", "stats", "versions", "trace/setting", "a/b/c"])
def test_other_pages_of_a_model_do_not_exist(page: str, client: httpx.Client) -> None:
    for model in ("any", "Qwen/Qwen3-VL-Embedding-2B"):
        response = client.get(f"/v2/models/{model}/{page}")
        assert (response.status_code, response.json()["error_type"]) == (404, "not_found")


def test_name_of_the_served_model_may_have_any_slashes() -> None:
    kserve.check_model_name("/models/a/config", ["/models/a/config"])
    with pytest.raises(NotFound):
        kserve.check_model_name("/models/a/config", ["/models/a"])


@pytest.mark.parametrize("path", ["/v2/other", "/v2/health/other", "/v2/models/any/config"])
def test_errors_of_kserves_paths_have_its_form(path: str, client: httpx.Client) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert isinstance(response.json()["error"], str)


def test_binary_tensors_are_refused_with_what_to_set(client: httpx.Client) -> None:
    headers = {"inference-header-content-length": "2", "content-type": "application/octet-stream"}
    response = client.post("/v2/models/any/infer", content=b"{}\0\0", headers=headers)
    assert response.status_code == 415
    assert "binary_data=False" in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/decode", {"ids": [True]}),
        ("/decode", {"ids": [[1], [False]]}),
        ("/decode", {"ids": ["1"]}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": ["1"]}),
        ("/v2/models/any/infer", {"inputs": [{"name": "text", "shape": ["1"], "datatype": "BYTES", "data": ["a"]}]}),
    ],
)
def test_other_types_are_no_numbers(path: str, body: dict[str, Any], client: httpx.Client) -> None:
    assert client.post(path, json=body).status_code == 400


def test_openai_client_asks_for_a_model_by_its_id(openai_client: openai.OpenAI) -> None:
    (listed,) = openai_client.models.list().data
    assert openai_client.models.retrieve(listed.id) == listed
    for unknown in ("text-embedding-3-small", "Qwen/Qwen3-VL-Embedding-2B"):
        with pytest.raises(openai.NotFoundError, match=f"model: got '{unknown}'") as caught:
            openai_client.models.retrieve(unknown)
        assert caught.value.code == "not_found"


def test_openai_client_shows_the_message_once(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.embeddings.create(model="any", input="")
    assert str(caught.value) == "Error code: 400 - item 0: text is empty; allowed: at least one character"
    assert sorted(caught.value.body) == ["code", "message", "param", "type"]  # type: ignore[arg-type]


def test_every_error_under_v1_has_openais_form(client: httpx.Client) -> None:
    for response, status, code in [
        (client.get("/v1/embeddings"), 405, "method_not_allowed"),
        (client.post("/v1/completions", json={}), 404, "not_found"),
        (client.post("/v1/embeddings", content=b"red"), 400, "invalid_request"),
    ]:
        assert response.status_code == status
        error = response.json()["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
