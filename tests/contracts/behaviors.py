"""What the HTTP tests of vLLM, text-embeddings-inference and infinity assert, restated for this service's model.

They need no client: each row sends requests and looks at the responses. `SOURCES` says where the assertions are.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from itertools import product
from typing import Any

import numpy as np

from tests.contracts.checks import EXAMPLE_IMAGE, TEXTS, assert_same, check, expected

SOURCES = {
    "vLLM": "tests/entrypoints/pooling/embed/test_online.py",
    "vLLM dimensions": "tests/entrypoints/pooling/embed/test_online_dimensions.py",
    "vLLM truncation": "tests/entrypoints/pooling/basic/test_truncation.py",
    "vLLM Cohere": "tests/entrypoints/pooling/embed/test_cohere_online.py",
    "vLLM bench": "vllm/benchmarks/lib/endpoint_request_func.py",
    "vLLM priority": "vllm/entrypoints/pooling/base/protocol.py",
    "TEI": "router/tests/test_http_embed.rs, router/src/http/server.rs",
    "infinity": "libs/infinity_emb/tests/end_to_end/test_api_with_dummymodel.py",
    "Vertex AI": "Custom container requirements for inference, in Vertex AI's documentation",
}
LONG = "red " * 20_000  # more tokens than an item may have


def send(url: str, path: str, fields: Any = None) -> tuple[int, Any, Any]:
    """Status, body and headers. A body that is not JSON stays bytes."""
    body = None if fields is None else json.dumps(fields).encode()
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        data, headers = response.read(), response.headers
    is_json = headers["content-type"].startswith("application/json")
    return response.status, json.loads(data) if is_json else data, headers


def vectors(url: str, fields: dict[str, Any], path: str = "/v1/embeddings") -> Any:
    status, body, _ = send(url, path, fields)
    assert status == 200, body
    return [one.get("embedding", one.get("data")) for one in body["data"]]


def message(url: str, path: str, fields: dict[str, Any]) -> str:
    """The message of a request that is refused."""
    found, body, _ = send(url, path, fields)
    assert found == 400, f"got {found}: {str(body)[:200]}"
    error = body["error"]
    return str(error if isinstance(error, str) else error["message"])


@check("vLLM", "id, usage, one vector per text; the served model by name", source=SOURCES["vLLM"])
def vllm_basic(url: str) -> None:
    _, models, _ = send(url, "/v1/models")
    name = models["data"][0]["id"]
    assert (models["data"][0]["root"], models["data"][0]["parent"]) == (name, None)
    _, body, _ = send(url, "/v1/embeddings", {"model": name, "input": TEXTS * 5, "encoding_format": "float"})
    assert (body["model"], len(body["data"]), body["usage"]["completion_tokens"]) == (name, 10, 0)
    assert body["id"]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0


@check("vLLM", "/tokenize and /detokenize", source=SOURCES["vLLM"])
def vllm_tokenize(url: str) -> None:
    _, body, _ = send(url, "/tokenize", {"model": "any", "prompt": "a green circle"})
    assert len(body["tokens"]) == body["count"] > 0
    _, text, _ = send(url, "/detokenize", {"model": "any", "tokens": body["tokens"]})
    assert "a green circle" in text["prompt"]  # in the chat template that the model gets
    _, bare, _ = send(url, "/tokenize", {"model": "any", "prompt": "a green circle", "add_special_tokens": False})
    _, text, _ = send(url, "/detokenize", {"model": "any", "tokens": bare["tokens"]})
    assert (text["prompt"], bare["count"]) == ("a green circle", len(bare["tokens"]))  # which is without it


@check("vLLM", "token ids as input", source=SOURCES["vLLM"], refusal="ids of another tokenizer would embed garbage")
def vllm_token_ids(url: str) -> None:
    for ids in ([1, 2, 3], [[1, 2, 3]] * 2):
        assert "token ids" in message(url, "/v1/embeddings", {"input": ids})


@check("vLLM", "base64, bytes and bytes_only in each type and byte order", source=SOURCES["vLLM"])
def vllm_bytes(url: str) -> None:
    floats = np.array(vectors(url, {"input": TEXTS}), np.float32)
    for (name, kind), endianness in product({"float32": "f4", "float16": "f2"}.items(), ["native", "big", "little"]):
        dtype = (">" if endianness == "big" else "<") + kind
        options = {"input": TEXTS, "embed_dtype": name, "endianness": endianness}
        as_base64 = vectors(url, {**options, "encoding_format": "base64"})
        found = [np.stack([np.frombuffer(base64.b64decode(one), dtype) for one in as_base64])]
        for encoding in ("bytes", "bytes_only"):
            _, data, headers = send(url, "/v1/embeddings", {**options, "encoding_format": encoding})
            assert ("metadata" in headers) == (encoding == "bytes")
            found.append(np.frombuffer(data, dtype).reshape(len(TEXTS), -1))
        assert all(np.abs(one - floats).max() < 1e-3 for one in found)
    metadata = json.loads(send(url, "/v1/embeddings", {"input": TEXTS, "encoding_format": "bytes"})[2]["metadata"])
    assert [set(one) for one in metadata["data"]] == [
        {"index", "embed_dtype", "endianness", "start", "end", "shape"}
    ] * 2


@check("vLLM", "an unknown encoding, type or byte order: 400 that names the value", source=SOURCES["vLLM"])
def vllm_bad_words(url: str) -> None:
    for name in ("encoding_format", "embed_dtype", "endianness"):
        assert f"bad_{name}" in message(url, "/v1/embeddings", {"input": "red", name: f"bad_{name}"})


@check("vLLM", "use_activation: not normalized if false", source=SOURCES["vLLM"])
def vllm_use_activation(url: str) -> None:
    default, true, false = (
        np.array(vectors(url, {"input": "red", "use_activation": value})) for value in (None, True, False)
    )
    assert_same(default, true)
    assert_same(true, false / np.linalg.norm(false))
    assert np.abs(true - false).max() > 1e-2


@check("vLLM", "/pooling: task embed; other tasks are refused", source=SOURCES["vLLM"])
def vllm_pooling(url: str) -> None:
    assert_same(vectors(url, {"input": TEXTS, "task": "embed"}, "/pooling"), expected(url))
    for task in ("classify", "token_classify", "plugin", "token_embed"):
        assert message(url, "/pooling", {"input": "red", "task": task}).startswith(f"Unsupported task: {task!r}")


@check("vLLM", "/invocations is /v1/embeddings, also for messages", source=SOURCES["vLLM"])
def vllm_invocations(url: str) -> None:
    for fields in ({"input": TEXTS[0]}, {"messages": [{"role": "user", "content": TEXTS[0]}]}):
        bodies = [send(url, path, fields)[1] for path in ("/v1/embeddings", "/invocations")]
        assert bodies[0].keys() == bodies[1].keys()
        assert_same(*([body["data"][0]["embedding"]] for body in bodies))


@check(
    "vLLM",
    "a conversation with an answer of the assistant",
    source=SOURCES["vLLM"],
    refusal="the model was not trained on dialogues",
)
def vllm_dialogue(url: str) -> None:
    turns = [{"role": role, "content": "red"} for role in ("user", "assistant", "user")]
    assert "assistant" in message(url, "/v1/embeddings", {"messages": turns})


@check("vLLM", "continue_final_message with add_generation_prompt: refused", source=SOURCES["vLLM"])
def vllm_continue(url: str) -> None:
    fields = {"messages": [{"role": "user", "content": "red"}], "add_generation_prompt": True}
    assert_same(vectors(url, fields), expected(url, ["red"]))
    assert "both" in message(url, "/v1/embeddings", {**fields, "continue_final_message": True})


@check("vLLM", "dimensions: -1 and 5 are refused", source=SOURCES["vLLM dimensions"])
def vllm_dimensions(url: str) -> None:
    assert len(vectors(url, {"input": ["red"] * 3, "dimensions": 64})[2]) == 64
    for size in (-1, 5):
        assert str(size) in message(url, "/v1/embeddings", {"input": "red", "dimensions": size})


@check("vLLM", "truncate_prompt_tokens: cuts, -1 is the limit, above it: 400", source=SOURCES["vLLM truncation"])
def vllm_truncation(url: str) -> None:
    def num_tokens(tokens: int | None) -> int:
        fields = {"input": LONG[:8000], "truncate_prompt_tokens": tokens}
        return int(send(url, "/v1/embeddings", fields)[1]["usage"]["prompt_tokens"])

    assert num_tokens(20) - num_tokens(10) == 10  # instruction and template do not count
    assert num_tokens(-1) == num_tokens(None)
    assert "truncate_prompt_tokens" in message(url, "/v1/embeddings", {"input": "red", "truncate_prompt_tokens": 10**6})


@check("vLLM", "priority: any whole number (test_priority.py: its effect)", source=SOURCES["vLLM priority"])
def vllm_priority(url: str) -> None:
    for priority in (None, 0, 1, 2**31, -1):
        assert_same(vectors(url, {"input": TEXTS, "priority": priority}), expected(url))
    for wrong in ("1", 1.5):
        assert "priority: got" in message(url, "/v1/embeddings", {"input": "red", "priority": wrong})


@check("vLLM", "the request of `vllm bench serve` for embeddings", source=SOURCES["vLLM bench"])
def vllm_bench(url: str) -> None:
    fields = {"model": "any", "input": "red", "truncate_prompt_tokens": -1}
    status, body, _ = send(url, "/v1/embeddings", fields)
    assert (status, body["usage"]["prompt_tokens"] > 0) == (200, True)


@check("vLLM", "Cohere's /v2/embed: structure, types, errors", source=SOURCES["vLLM Cohere"])
def vllm_cohere(url: str) -> None:
    kinds = ["float", "binary", "ubinary", "base64"]
    _, body, _ = send(url, "/v2/embed", {"model": "any", "texts": ["red"], "embedding_types": kinds})
    size = len(body["embeddings"]["float"][0])
    assert [len(body["embeddings"][kind][0]) for kind in kinds[1:3]] == [size // 8] * 2
    assert_same(np.frombuffer(base64.b64decode(body["embeddings"]["base64"][0]), "<f4"), body["embeddings"]["float"][0])
    assert (body["texts"], body["meta"]["api_version"]["version"]) == (["red"], "2")
    assert body["meta"]["tokens"]["input_tokens"] > 0
    assert "nonexistent" in message(url, "/v2/embed", {"texts": ["red"], "input_type": "nonexistent"})
    message(url, "/v2/embed", {"model": "any"})


@check("vLLM", "Cohere's truncate: START and END differ, NONE refuses", source=SOURCES["vLLM Cohere"])
def vllm_cohere_truncate(url: str) -> None:
    text = LONG + "a green circle"
    start, end = (
        send(url, "/v2/embed", {"texts": [text], "truncate": how, "max_tokens": 30})[1]["embeddings"]["float"][0]
        for how in ("START", "END")
    )
    assert float(np.dot(start, end)) < 0.99
    message(url, "/v2/embed", {"texts": [text], "truncate": "NONE"})


@check("TEI", "/embed: one text, several equal ones, headers with times", source=SOURCES["TEI"])
def tei_embed(url: str) -> None:
    _, one, headers = send(url, "/embed", {"inputs": "red"})
    assert all(int(headers[f"x-{name}-time"]) >= 0 for name in ("total", "tokenization", "queue", "inference"))
    assert int(headers["x-compute-tokens"]) > 0
    _, several, _ = send(url, "/embed", {"inputs": ["red"] * 5})
    assert_same(several, one * 5)


@check("TEI", "/similarity, /tokenize, /decode, /info", source=SOURCES["TEI"])
def tei_others(url: str) -> None:
    _, scores, _ = send(url, "/similarity", {"inputs": {"source_sentence": "red", "sentences": ["red", "blue"]}})
    assert abs(scores[0] - 1) < 1e-5 < scores[0] - scores[1]
    _, (tokens,), _ = send(url, "/tokenize", {"inputs": ["red"], "add_special_tokens": False})
    _, texts, _ = send(url, "/decode", {"ids": [[one["id"] for one in tokens]]})
    assert texts == ["red"]
    _, info, _ = send(url, "/info")
    assert {"model_id", "max_input_length", "max_client_batch_size"} <= set(info)


@check("TEI", "an empty text or list: error with error_type", source=SOURCES["TEI"])
def tei_errors(url: str) -> None:
    for inputs in ("", []):
        status, body, _ = send(url, "/embed", {"inputs": inputs})
        assert (status in (400, 413, 422), set(body)) == (True, {"error", "error_type"})


@check(
    "TEI",
    "/embed_raw and /embed_sparse",
    source=SOURCES["TEI"],
    refusal="the model has one dense vector per item, none per token",
)
def tei_raw(url: str) -> None:
    for path in ("/embed_raw", "/embed_sparse"):
        assert send(url, path, {"inputs": "red"})[0] == 404


@check("infinity", "/models with stats, /health with the time", source=SOURCES["infinity"])
def infinity_pages(url: str) -> None:
    _, models, _ = send(url, "/models")
    assert isinstance(models["data"][0]["stats"], dict)
    _, health, _ = send(url, "/health")
    assert health["unix"] > 0


@check("infinity", "base64 equals floats; dimensions; a text that is too long", source=SOURCES["infinity"])
def infinity_embeddings(url: str) -> None:
    floats = vectors(url, {"input": TEXTS, "encoding_format": "float"}, "/embeddings")
    as_base64 = vectors(url, {"input": TEXTS, "encoding_format": "base64"}, "/embeddings")
    assert_same([np.frombuffer(base64.b64decode(one), "<f4") for one in as_base64], floats)
    assert len(vectors(url, {"input": TEXTS, "dimensions": 64}, "/embeddings")[1]) == 64
    message(url, "/embeddings", {"input": "%_" * 150_000})


@check("Vertex AI", "instances and parameters to predictions; numbers as floats; health", source=SOURCES["Vertex AI"])
def vertex_predict(url: str) -> None:
    assert send(url, "/health")[0] == 200
    _, body, headers = send(url, "/predict", {"instances": TEXTS, "parameters": {"dimensions": 64.0}})
    assert (set(body), headers["content-type"]) == ({"predictions"}, "application/json")
    assert_same(body["predictions"], expected(url, dimensions=64))
    picture = [{"image": EXAMPLE_IMAGE, "instruction": "Find it."}]
    assert_same(send(url, "/predict", {"instances": picture})[1]["predictions"], expected(url, picture))
    assert "instances" in message(url, "/predict", {"parameters": {}})
