"""The running service, over HTTP, with random weights: responses, errors, and many requests at once, some of them invalid."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import re
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bentoml
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from embedder import Embedder
from tests.conftest import ROOT, Server, encoded, picture, start_server, words

SAME = 1e-6  # float32, one content on two routes or in two batches


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PNG = b64(encoded(picture(70, 50)))


def vector(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    return np.array(response.json()["embedding"], np.float32)


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "item", "message", "type"]
    fields: dict[str, Any] = body["error"]
    return fields


def test_response_to_a_text_has_a_unit_vector_and_its_usage(client: httpx.Client, embedder: Embedder) -> None:
    body = client.post("/txt/embed", json={"input": "red"}).json()
    assert np.linalg.norm(body["embedding"]) == pytest.approx(1, abs=1e-6)
    assert body["dimensions"] == len(body["embedding"]) == 192
    assert body["model"] == embedder.checkpoint.name
    tokens = embedder.preprocessor(item_of("red")).num_tokens
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def item_of(text: str) -> Any:
    from embedder.inputs.items import EmbeddingItem, Text

    return EmbeddingItem((Text(text),))


def test_async_bentoml_client_batches_across_calls(server: Server, embedder: Embedder) -> None:
    texts = [words(1 + index % 9, index) for index in range(32)]

    async def embed_all() -> list[Any]:
        async with bentoml.AsyncHTTPClient(server.url) as bento:
            return await asyncio.gather(*(bento.embed_texts(texts=[text]) for text in texts))

    answers = [np.array(rows[0], np.float32) for rows in asyncio.run(embed_all())]
    for answer, expected in zip(answers, embedder.embed(texts), strict=True):
        assert np.abs(answer - expected).max() <= SAME


@pytest.mark.slow
def test_callers_of_a_batching_api_do_not_wait_for_each_other(random_checkpoint: Path, tmp_path: Path) -> None:
    """BentoML runs one gathered batch after the other; the rows of all of them wait in the engine's queue together."""
    limits = {"max_batch_tokens": "1024", "max_input_tokens": "1024"}
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu", **limits)

    async def quick_next_to_slow() -> None:
        async with bentoml.AsyncHTTPClient(server.url, timeout=240) as bento:
            slow = asyncio.create_task(bento.embed_texts(texts=[words(1000, seed) for seed in range(100)]))
            while queued_items(server) < 12:
                await asyncio.sleep(0.01)
                assert not slow.done()
            await bento.embed_texts(texts=["quick"])
            assert not slow.done()
            await slow

    try:
        asyncio.run(quick_next_to_slow())
    finally:
        assert server.stop() == 0


def queued_items(server: Server) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    return float(re.findall(r"^embedder_queue_items (\S+)$", metrics, re.MULTILINE)[0])


def test_without_normalize_the_length_is_the_models(client: httpx.Client) -> None:
    whole = vector(client.post("/txt/embed", json={"input": "red"}))
    raw = vector(client.post("/txt/embed", json={"input": "red", "normalize": False}))
    assert np.linalg.norm(raw) != pytest.approx(1, abs=1e-2)
    assert np.abs(raw / np.linalg.norm(raw) - whole).max() <= SAME


def test_base64_holds_the_same_floats(client: httpx.Client) -> None:
    whole = vector(client.post("/txt/embed", json={"input": ["red"]}))[0]
    body = client.post("/txt/embed", json={"input": ["red"], "encoding_format": "base64"}).json()
    assert np.abs(np.frombuffer(base64.b64decode(body["embedding"][0]), "<f4") - whole).max() <= SAME


def test_long_text_is_cut_with_a_warning(client: httpx.Client) -> None:
    body = client.post("/txt/embed", json={"input": "a sentence. " * 8500}).json()  # 102 kB
    assert body["usage"]["prompt_tokens"] == 8192
    assert body["warnings"][0].startswith("item 0: got ")
    assert "allowed: 8192" in body["warnings"][0]


BAD_REQUESTS: dict[str, tuple[str, Any, int, str, str]] = {
    "dimensions 0": ("/txt/embed", {"input": "a", "dimensions": 0}, 400, "unsupported_dimensions", "got 0 (a number); allowed: a positive whole number"),
    "dimensions 5000": ("/txt/embed", {"input": "a", "dimensions": 5000}, 400, "unsupported_dimensions", "got 5000; allowed: a whole number from 64 to 192"),
    "dimensions of letters": ("/txt/embed", {"input": "a", "dimensions": "many"}, 400, "unsupported_dimensions", "got 'many' (a string); allowed: a positive whole number"),
    "dimensions NaN": ("/txt/embed", b'{"input": "a", "dimensions": NaN}', 400, "invalid_request", "not valid JSON"),
    "empty list": ("/txt/embed", {"input": []}, 400, "invalid_request", "got an empty list; allowed: at least one"),
    "too many items": ("/txt/embed", {"input": ["a"] * 2049}, 413, "request_too_large", "got 2049 items; allowed: 1 to 2048"),
    "empty text": ("/txt/embed", {"input": ""}, 400, "invalid_request", "text is empty; allowed: at least one character"),
    "number for text": ("/txt/embed", {"input": 5}, 400, "invalid_request", "got 5 (a number); allowed: a string or a list of strings"),
    "number in the list": ("/txt/embed", {"input": ["a", 5]}, 400, "invalid_request", "input[1]: got 5 (a number)"),
    "misspelled field": ("/txt/embed", {"input": "a", "instrction": "x"}, 400, "invalid_request", "unknown field: instrction"),
    "no input": ("/txt/embed", {}, 400, "invalid_request", "input: missing"),
    "not JSON": ("/txt/embed", b"red", 400, "invalid_request", "not valid JSON"),
    "JSON list": ("/txt/embed", b'["red"]', 400, "invalid_request", "must be a JSON object, got a list"),
    "huge text": ("/txt/embed", {"input": "x" * 200_001}, 400, "input_too_long", "200001 characters; allowed: up to 200000"),
    "1x1 image": ("/img/embed", {"input": b64(encoded(picture(1, 1)))}, 400, "invalid_media", "1x1 pixels; allowed: at least 2"),
    "1:500 image": ("/img/embed", {"input": b64(encoded(picture(4, 2000)))}, 400, "invalid_media", "aspect ratio of 500:1; allowed: up to 200:1"),
    "not base64": ("/img/embed", {"input": "it's red"}, 400, "invalid_media", "not valid base64"),
    "a path": ("/img/embed", {"input": "/etc/hostname"}, 400, "invalid_media", "not valid base64"),
    "a URL": ("/img/embed", {"input": "https://example.com/a.png"}, 400, "invalid_request", "URLs are off; send base64 or a data URI, or ask the operator to set EMBEDDER_URL_HOSTS"),
    "truncated PNG": ("/img/embed", {"input": b64(encoded(picture(99, 99))[:-300])}, 400, "invalid_media", "truncated"),
    "empty image": ("/img/embed", {"input": ""}, 400, "invalid_media", "image is empty"),
    "a PDF": ("/img/embed", {"input": b64(b"%PDF-1.7 and so on")}, 400, "invalid_media", "PDF document"),
    "too many batch rows": ("/embed_texts", {"texts": ["a"] * 2049}, 413, "request_too_large", "got 2049 items; allowed: 1 to 2048"),
    "too many values": ("/embed_images", {"images": [["a"] * 51_300]}, 413, "request_too_large", "more than 51200 JSON values"),
    "too deep for a message": ("/txt/embed", b'{"input":' + b"[" * 1000 + b"]" * 1000 + b"}", 400, "invalid_request", "got [[["),
    "batch row of a wrong type": ("/embed_texts", {"texts": ["a", 5]}, 400, "invalid_request", "item 1: got 5 (a number)"),
    "batch row empty": ("/embed_texts", {"texts": ["a", ""]}, 400, "invalid_request", "item 1: text is empty"),
    "batch with a field next to the rows": ("/embed_texts", {"texts": ["a"], "foo": 1}, 400, "invalid_request", "foo: Extra inputs are not permitted"),
    "batch not a list": ("/embed_texts", {"texts": "a"}, 400, "invalid_request", "texts: Input should be a valid array"),
    "batch image broken": ("/embed_images", {"images": [PNG, "!"]}, 400, "invalid_media", "item 1: image is not valid base64"),
    "unknown route": ("/text/embed", {"input": "a"}, 404, "not_found", "no such path: /text/embed (did you mean /txt/embed?)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_error_names_the_value_received_and_what_is_allowed(name: str, client: httpx.Client) -> None:
    path, body, status, code, message = BAD_REQUESTS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert error(response)["code"] == code
    assert message in error(response)["message"]


def test_get_on_a_post_route_is_405_in_the_services_form(client: httpx.Client) -> None:
    response = client.get("/txt/embed")
    assert response.status_code == 405
    assert error(response)["code"] == "method_not_allowed"


class WritesAFile:
    """Unpickling it writes a file, as an attack would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("path", ["/txt/embed", "/embed", "/v1/embeddings", "/embed_texts", "/embed_images"])
@pytest.mark.parametrize(
    "content_type",
    [
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/vnd.bentoml+pickle",
        "Application/Vnd.BentoML+Pickle; charset=utf-8",
        "application/vnd.bentoml+pickle+json",
        "application/json",
    ],
)
def test_pickle_is_never_read(path: str, content_type: str, client: httpx.Client, tmp_path: Path) -> None:
    payload = pickle.dumps(WritesAFile(tmp_path / "written"))
    headers = {"content-type": content_type, "payload-container": "DefaultContainer", "buffer-lengths": ""}
    response = client.post(path, content=payload, headers=headers)
    is_json = content_type.endswith("json")
    assert response.status_code == (400 if is_json else 415)
    if not path.startswith("/v1/"):
        assert error(response)["code"] == ("invalid_request" if is_json else "unsupported_content_type")
    assert not (tmp_path / "written").exists()
    pickle.loads(payload)
    assert (tmp_path / "written").exists()  # the payload is a real one


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/embed", "/v1/embeddings", "/embed_texts", "/info", "/openapi.json", "/playground", "/"]
)
def test_headers_allow_no_other_origin_and_do_not_name_the_server(method: str, path: str, client: httpx.Client) -> None:
    headers = {"origin": "https://example.com", "access-control-request-method": "POST"}
    answer = client.request(method, path, headers=headers, json={"texts": ["red"]} if method == "POST" else None)
    assert not [name for name in answer.headers if name.startswith(("access-control-", "server", "x-bentoml"))]
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.slow
def test_body_over_the_limit_is_413_even_without_a_content_length(random_checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(tmp_path, model=str(random_checkpoint), max_body_bytes="20000")
    try:
        for path in ("/txt/embed", "/embed_texts"):
            for content in (b"x" * 30_000, (b"x" * 1000 for _ in range(30))):  # the second is sent in chunks
                response = httpx.post(f"{server.url}{path}", content=content)
                assert response.status_code == 413
                assert "larger than 20000 bytes" in error(response)["message"]
        assert httpx.post(f"{server.url}/txt/embed", json={"input": "red"}).status_code == 200
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_full_queue_is_429_with_retry_after(random_checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(tmp_path, model=str(random_checkpoint), max_queued_tokens="2000")
    try:
        body = {"input": [words(300, seed) for seed in range(2)]}  # fits the queue, but not twice
        with ThreadPoolExecutor(16) as pool:
            responses = list(
                pool.map(lambda _: httpx.post(f"{server.url}/txt/embed", json=body, timeout=60), range(16))
            )
        assert {response.status_code for response in responses} == {200, 429}
        refused = next(response for response in responses if response.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert error(refused)["code"] == "overloaded"
        too_much = httpx.post(f"{server.url}/txt/embed", json={"input": body["input"] * 20}, timeout=60)
        assert (too_much.status_code, error(too_much)["code"]) == (413, "request_too_large")
        assert httpx.post(f"{server.url}/txt/embed", json={"input": "red"}).status_code == 200
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_200_concurrent_requests_of_which_5_are_broken(server: Server, embedder: Embedder) -> None:
    broken: dict[int, tuple[dict[str, Any], str]] = {
        20: ({"input": "not base64!"}, "not valid base64"),
        60: ({"input": b64(encoded(picture(120, 90))[:-200])}, "truncated"),
        100: ({"input": ""}, "image is empty"),
        140: ({"input": b64(b"%PDF-1.4 and so on")}, "PDF document"),
        180: ({"input": {"image": PNG}}, "allowed: a string or a list of strings"),
    }
    texts = {index: words(1 + index % 40, index) for index in range(0, 200, 2) if index not in broken}
    images = {index: b64(encoded(picture(32 + index, 64, index))) for index in range(1, 200, 2)}

    async def send(client: httpx.AsyncClient, index: int) -> httpx.Response:
        if index in broken:
            return await client.post("/img/embed", json=broken[index][0])
        if index in texts:
            return await client.post("/txt/embed", json={"input": texts[index]})
        return await client.post("/img/embed", json={"input": images[index]})

    async def send_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(send(client, index) for index in range(200)))

    responses = asyncio.run(send_all())
    expected = dict(zip(texts, embedder.embed(list(texts.values())), strict=True))
    expected |= dict(zip(images, embedder.embed([{"image": image} for image in images.values()]), strict=True))
    assert len(expected) == 195
    for index, response in enumerate(responses):
        if index in broken:
            assert response.status_code == 400
            assert broken[index][1] in error(response)["message"]
        else:
            assert np.abs(vector(response) - expected[index]).max() <= SAME
    assert httpx.post(f"{server.url}/txt/embed", json={"input": "next"}).status_code == 200


def test_bad_row_fails_only_its_own_call_of_a_batching_api(server: Server, embedder: Embedder) -> None:
    async def call_all() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            bodies = [{"texts": [f"text {index}", "" if index in (2, 5) else "other"]} for index in range(8)]
            return await asyncio.gather(*(client.post("/embed_texts", json=body) for body in bodies))

    responses = asyncio.run(call_all())
    for index, response in enumerate(responses):
        if index in (2, 5):
            assert response.status_code == 400
            assert error(response)["item"] == 1
        else:
            expected = embedder.embed([f"text {index}", "other"])
            assert np.abs(np.array(response.json(), np.float32) - np.stack(expected)).max() <= SAME


def test_bentoml_client_raises_the_services_error(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url) as bento, pytest.raises(bentoml.exceptions.BentoMLException) as failure:
        bento.embed_images(images=["!"])
    assert "not valid base64" in str(failure.value)


def test_probes_and_info(client: httpx.Client, random_checkpoint: Path) -> None:
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 200
    health = client.get("/health").json()
    assert (health.pop("unix") > 1.7e9, health) == (True, {"status": "ready"})
    info = client.get("/info").json()
    assert info["model"] == str(random_checkpoint)
    assert info["is_bundled_model"] is False
    assert info["pixels"] == {"min": 4096, "max": 1_310_720, "multiple_of": 32}
    assert info["hidden_size"] == 192
    assert info["device"] == "cpu"


def test_openapi_document_says_that_lists_are_accepted(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path in ("/txt/embed", "/img/embed"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = schema["$ref"].rpartition("/")[2]
        options = document["components"]["schemas"][name]["properties"]["input"]["anyOf"]
        assert [option["maxItems"] for option in options if option["type"] == "array"] == [2048]
    assert client.get("/docs.json").json() == document


def test_log_has_no_contents_of_requests_and_no_tracebacks(server: Server, client: httpx.Client) -> None:
    client.post("/txt/embed", json={"input": ["a very secret text", 5]})
    client.post("/embed_texts", json={"texts": "another secret text"})
    client.post("/embed_texts", content=b"a third secret text")
    log = server.log.read_text()
    assert "secret" not in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_cached_items_are_counted_in_a_header_and_equal_on_every_route(
    random_checkpoint: Path, tmp_path: Path, client: httpx.Client
) -> None:
    assert "x-embedding-cache" not in client.post("/txt/embed", json={"input": "red"}).headers
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu", cache_bytes="100000")
    with httpx.Client(base_url=server.url, timeout=60) as cached:
        answers = [
            cached.post("/txt/embed", json={"input": ["red", "green", "red"]}),
            cached.post("/embed", json={"items": ["red", "blue", {"image": "%%%"}]}),
            cached.post("/v1/embeddings", json={"input": "red", "dimensions": 64}),
            cached.post("/v2/embed", json={"model": "any", "texts": ["red"], "input_type": "search_document"}),
        ]
    assert server.stop() == 0
    assert [answer.headers["x-embedding-cache"] for answer in answers] == ["hits=1", "hits=1", "hits=1", "hits=1"]
    first, _, third = answers[0].json()["embedding"]
    assert first == third == answers[1].json()["results"][0]["embedding"]


LOSES_ITS_DEVICE = """
from embedder.errors import DeviceFailed
from embedder.models import Models
from service import Qwen3VLEmbedding as Qwen3VLEmbedding

launch = Models._launch

def lose(self, inputs):
    if max(one.num_tokens for one in inputs) > 500:
        raise DeviceFailed("AcceleratorError: CUDA error: device-side assert triggered")
    return launch(self, inputs)

Models._launch = lose
"""


@pytest.mark.slow
def test_worker_that_loses_its_device_responds_and_exits(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loses_its_device.py").write_text(LOSES_ITS_DEVICE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("BENTOML_CONTAINERIZED", "true")  # where BentoML ends with its worker, and a supervisor acts
    target = "loses_its_device:Qwen3VLEmbedding"
    server = start_server(tmp_path, target=target, cwd=tmp_path, model=str(random_checkpoint), device="cpu")
    response = httpx.post(f"{server.url}/txt/embed", json={"input": words(600)}, timeout=30)
    body = error(response)
    assert (response.status_code, body["code"], body["item"]) == (500, "device_failed", None)
    assert httpx.get(f"{server.url}/readyz", timeout=5).status_code == 503
    assert server.process.wait(60) != 0
    assert "stops with 1 item pending: the device failed: AcceleratorError" in server.log.read_text()


COSTLY = {"items": [{f"instructio{number}{place}": 1 for place in range(5)} for number in range(2048)]}


def test_threads_that_compute_leave_the_interpreter_to_probes(server: Server) -> None:
    """Refusing these bodies keeps a thread busy. Its CPU time is measured, to which other processes do not add.

    With Python's default switch interval, it computes for 20 ms while a probe waits, on an idle machine.
    """
    worker = server.workers[0]
    is_over = threading.Event()

    def send() -> None:
        while not is_over.is_set():
            assert httpx.post(f"{server.url}/embed", json=COSTLY, timeout=60).status_code == 400

    def cpu_s_of_threads() -> float:
        """CPU seconds of all threads but the event loop's."""
        tasks = [task for task in Path(f"/proc/{worker}/task").iterdir() if task.name != str(worker)]
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    senders = [threading.Thread(target=send) for _ in range(2)]
    for sender in senders:
        sender.start()
    spent_s = []
    for _ in range(40):
        time.sleep(0.02)
        begin_s = cpu_s_of_threads()
        assert httpx.get(f"{server.url}/livez", timeout=60).status_code == 200
        spent_s.append(cpu_s_of_threads() - begin_s)
    is_over.set()
    for sender in senders:
        sender.join()
    assert statistics.median(spent_s) < 0.008
