"""`python -m embedder.verify` reports what is right, what is wrong, and what it did not check."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embedder import Embedder
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model.weights import load_model
from embedder.verify import checks, published
from embedder.verify.__main__ import main
from embedder.verify.checks import verify
from embedder.verify.http_service import Service, ServiceFault
from tests.conftest import ROOT, Server, encoded, picture

Vector = NDArray[np.float32]
Answer = Callable[[str, list[Any], int | None], list[Vector]]  # of path, items and dimensions


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """The exit status, and the verdict of each row."""
    status = main(arguments)
    header, *rows, total = capsys.readouterr().out.splitlines()
    start = header.index("verdict")
    verdicts = {re.split("  +", row)[0]: row[start:] for row in rows}
    assert len(verdicts) == len(rows)
    counts = [int(count) for count in re.findall(r"\d+", total)]
    kinds = ("ok", "FAILED", "not checked")
    assert counts == [sum(one.startswith(kind) for one in verdicts.values()) for kind in kinds]
    return status, verdicts


def failed(verdicts: dict[str, str]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict == "FAILED"}


def unchecked(verdicts: dict[str, str]) -> dict[str, str]:
    found = {name: verdict.removeprefix("not checked: ") for name, verdict in verdicts.items()}
    return {name: why for name, why in found.items() if why != verdicts[name]}


@contextmanager
def stub(answer: Answer, **info: Any) -> Iterator[str]:
    """Run a server with the three routes and yield its URL; `answer` makes the vectors."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"model": "stub", "hidden_size": 192, "dtype": "float32", **info})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            items = body["items"] if self.path == "/embed" else [{"text": text} for text in body["input"]]
            vectors = [vector.tolist() for vector in answer(self.path, items, body.get("dimensions"))]
            results = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
            self._send({"results": results} if self.path == "/embed" else {"embedding": vectors})

        def _send(self, fields: dict[str, Any]) -> None:
            body = json.dumps(fields).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


PUBLISHED = {
    *(f"published: {' * '.join(pair)}" for pair in published.SIMILARITIES),
    "published: first values of image",
}
NEEDS_A_FOLDER = {"prompt end", "token ids", "library = transformers", "service = library"}
NOT_THE_2B = dict.fromkeys(PUBLISHED, "not the published 2B")


def test_bundled_model_passes_as_a_command() -> None:
    command = [sys.executable, "-m", "embedder.verify", "bundled", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 ok, 0 failed, 8 not checked" in done.stdout
    assert re.search(r"^library = transformers, image +[01]\.\d+ +>= 0\.99999 +ok$", done.stdout, re.MULTILINE)


def test_random_checkpoint_passes(random_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, verdicts = run(capsys, str(random_checkpoint), "--device", "cpu")
    assert status == 0
    assert not failed(verdicts)
    assert unchecked(verdicts) == {**NOT_THE_2B, "service = library": "no --url was given"}


def test_checkpoint_in_bfloat16_passes_with_the_bfloat16_thresholds(random_checkpoint: Path) -> None:
    (library,) = [
        check
        for check in verify(str(random_checkpoint), device="cpu", dtype="bfloat16")
        if check.name == "library = transformers, text"
    ]
    assert (library.expected, library.verdict) == (">= 0.9997", "ok")


def test_checkpoint_that_transformers_cannot_load_is_listed_as_not_checked(
    random_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "embed_with_transformers", Mock(side_effect=OSError("no chat template")))
    status, verdicts = run(capsys, str(random_checkpoint), "--device", "cpu")
    assert status == 0
    assert unchecked(verdicts)["library = transformers"] == "transformers cannot load the checkpoint: no chat template"
    assert verdicts["prompt end"] == "ok"


def test_running_service_passes_and_is_compared_with_its_folder(
    server: Server, random_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, verdicts = run(capsys, str(random_checkpoint), "--url", f"{server.url}/", "--device", "cpu")
    assert status == 0
    assert not failed(verdicts)
    assert unchecked(verdicts) == NOT_THE_2B
    assert {f"service = {other}, {kind}" for other in ("library", "transformers") for kind in ("text", "image")} <= set(
        verdicts
    )


def test_service_without_its_folder_is_checked_over_http_only(
    server: Server, random_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, verdicts = run(capsys, random_checkpoint.name, "--url", server.url)
    assert status == 0
    assert unchecked(verdicts) == {
        **NOT_THE_2B,
        **dict.fromkeys(NEEDS_A_FOLDER, "MODEL is not a folder on this machine"),
    }


def test_service_of_another_model_fails(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    status, verdicts = run(capsys, "owner/another", "--url", server.url)
    assert (status, failed(verdicts)) == (1, {"model served"})
    status, verdicts = run(capsys, "bundled", "--url", server.url, "--device", "cpu")
    assert status == 1
    assert failed(verdicts) == {
        f"service = {other}, {kind}" for other in ("library", "transformers") for kind in ("text", "image")
    }


@pytest.fixture(scope="module")
def raw_text(random_checkpoint: Path) -> Callable[[str], Vector]:
    """Embed a text without the prompt: the most common fault of other servers."""
    tokenizer = load_tokenizer(random_checkpoint)
    model = load_model(random_checkpoint, torch.float32, torch.device("cpu"))

    @torch.no_grad()
    def embed(text: str) -> Vector:
        states = model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state
        vector: Vector = states[0, -1].numpy()
        return vector

    return embed


def unit(vector: Vector) -> Vector:
    return vector / np.linalg.norm(vector)


def without(item: Any, field: str) -> Any:
    return {name: value for name, value in item.items() if name != field}


TEXTS = {"service = library, text", "service = transformers, text"}
IMAGES = {"service = library, image", "service = transformers, image"}
BATCH = {"single = in a batch, text", "single = in a batch, image"}
WRONG: dict[str, set[str]] = {  # and the checks that detect it over HTTP
    "no template": {"instruction changes the vector"},
    "not normalized": {"unit length"},
    "cut, not normalized again": {"unit length"},
    "not cut": {"64 dimensions = first values"},
    "the last dimensions": {"64 dimensions = first values"},
    "instruction dropped": {"instruction changes the vector"},
    "instruction as it is": {"instruction gets a final period"},
    "another default": {"default instruction"},
    "mixed with the first item of the batch": BATCH,
    "another order": BATCH,
    "one route without template": {"/txt/embed = /embed"},
}


def wrong_answer(fault: str, embedder: Embedder, raw_text: Callable[[str], Vector]) -> Answer:
    """The right vectors, but for one fault."""

    def answer(path: str, items: list[Any], dimensions: int | None) -> list[Vector]:
        is_raw = fault == "no template" or (fault == "one route without template" and path == "/txt/embed")
        if fault == "instruction dropped":
            items = [without(item, "instruction") for item in items]
        if fault == "another default":
            items = [{"instruction": "Embed it.", **item} for item in items]
        if fault == "blind":
            items = [{**without(item, "image"), "text": item.get("text", "red")} for item in items]
        vectors = embedder.embed(items)
        if is_raw:
            raw = [raw_text(item.get("text", "red")) for item in items]
            vectors = [
                vector if "image" in item else unit(one) for item, vector, one in zip(items, vectors, raw, strict=True)
            ]
        if fault == "instruction as it is":
            vectors = [
                embedder.embed([{**item, "instruction": "Find it!"}])[0]
                if item.get("instruction") == "Find it"
                else vector
                for item, vector in zip(items, vectors, strict=True)
            ]
        if fault == "mixed with the first item of the batch":
            vectors = [unit(vector + np.float32(0.1) * vectors[0]) for vector in vectors]
        if fault == "another order":
            vectors = vectors[1:] + vectors[:1]
        if dimensions and fault != "not cut":
            part = slice(-dimensions, None) if fault == "the last dimensions" else slice(dimensions)
            vectors = [vector[part] if "again" in fault else unit(vector[part]) for vector in vectors]
        return [vector * 3 for vector in vectors] if fault == "not normalized" else vectors

    return answer


@pytest.mark.parametrize("fault", WRONG)
def test_server_with_one_fault_fails_the_check_for_it(
    fault: str, embedder: Embedder, raw_text: Callable[[str], Vector], capsys: pytest.CaptureFixture[str]
) -> None:
    with stub(wrong_answer(fault, embedder, raw_text)) as url:
        status, verdicts = run(capsys, "stub", "--url", url)
    assert status == 1
    assert WRONG[fault] <= failed(verdicts)
    if fault != "another order":
        assert failed(verdicts) - {"default instruction"} == WRONG[fault] - {"default instruction"}


@pytest.mark.parametrize(("fault", "failures"), [("no template", TEXTS), ("blind", IMAGES), ("nothing", set())])
def test_server_with_another_prompt_or_image_differs_from_its_folder(
    fault: str,
    failures: set[str],
    embedder: Embedder,
    raw_text: Callable[[str], Vector],
    random_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stub(wrong_answer(fault, embedder, raw_text)) as url:
        status, verdicts = run(capsys, str(random_checkpoint), "--url", url, "--device", "cpu")
    assert status == bool(failures)
    assert failed(verdicts) & (TEXTS | IMAGES) == failures
    assert not failed(verdicts) or failures


def test_changed_default_instruction_is_not_checked(
    embedder: Embedder, raw_text: Callable[[str], Vector], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = wrong_answer("another default", embedder, raw_text)
    with stub(answer, default_instruction="Embed it.") as url:
        status, verdicts = run(capsys, "stub", "--url", url)
    assert status == 0
    assert unchecked(verdicts)["default instruction"] == "the service uses 'Embed it.'"


def test_vectors_of_another_size_than_info_says_fail(
    embedder: Embedder, raw_text: Callable[[str], Vector], capsys: pytest.CaptureFixture[str]
) -> None:
    with stub(wrong_answer("nothing", embedder, raw_text), hidden_size=2048) as url:
        assert failed(run(capsys, "stub", "--url", url)[1]) == {"hidden_size"}


def published_vectors() -> dict[str, Vector]:
    """Four unit vectors that have the published similarities; the image's vector starts with the published values."""
    names = ["image", "query", "text", "both"]
    gram = np.eye(4)
    for pair, similarity in published.SIMILARITIES.items():
        one, other = (names.index(name) for name in pair)
        gram[one, other] = gram[other, one] = similarity
    axes = np.random.default_rng(0).normal(size=(4, 2048))
    rest = axes[0, len(published.IMAGE_VALUES) :]
    axes[0] = [*published.IMAGE_VALUES, *(rest / np.linalg.norm(rest) * np.sqrt(1 - (published.IMAGE_VALUES**2).sum()))]
    basis = np.linalg.qr(axes.T)[0].T
    basis[0] *= np.sign(basis[0] @ axes[0])
    return dict(zip(names, (np.linalg.cholesky(gram) @ basis).astype(np.float32), strict=True))


def test_published_values_pass_or_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = published_vectors()
    demo = tmp_path / "demo.jpeg"
    demo.write_bytes(encoded(picture(64, 64), "JPEG"))
    image = base64.b64encode(demo.read_bytes()).decode()
    names = {
        json.dumps({"text": published.PUBLISHED_QUERY, "instruction": QUERY_INSTRUCTION}): "query",
        json.dumps({"text": published.PUBLISHED_TEXT}): "text",
        json.dumps({"image": image}): "image",
        json.dumps({"text": published.PUBLISHED_TEXT, "image": image}): "both",
    }

    def answer(path: str, items: list[Any], dimensions: int | None) -> list[Vector]:
        found = [vectors[names.get(json.dumps(item), "text")] for item in items]
        return [unit(vector[:dimensions]) for vector in found]

    with stub(answer, model="Qwen/Qwen3-VL-Embedding-2B", hidden_size=2048) as url:
        command = ("Qwen/Qwen3-VL-Embedding-2B", "--url", url)
        right = run(capsys, *command, "--image", str(demo))[1]
        assert {name for name in PUBLISHED if right[name] == "ok"} == PUBLISHED
        blind = run(capsys, *command)[1]
        assert blind["published: query * text"] == "ok"
        assert {name: why for name, why in unchecked(blind).items() if name in PUBLISHED} == dict.fromkeys(
            PUBLISHED - {"published: query * text"}, "needs --image, the demo.jpeg of the Qwen-VL assets"
        )
        vectors["image"] = np.roll(vectors["image"], 1)
        vectors["query"] = vectors["image"]
        status, wrong = run(capsys, *command, "--image", str(demo))
        assert status == 1
        assert {name for name in PUBLISHED if wrong[name] == "ok"} == {"published: text * both"}


def test_service_with_other_response_shapes_fails(capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Answer] = [
        lambda path, items, dimensions: [np.ones((2, 2), np.float32)] * len(items),
        lambda path, items, dimensions: [np.ones(192, np.float32)],
    ]
    for answer in answers:
        with stub(answer) as url:
            status, verdicts = run(capsys, "stub", "--url", url)
            assert status == 1
            assert verdicts["responses"] == "FAILED"


def test_error_response_of_the_service_is_quoted(server: Server) -> None:
    with pytest.raises(ServiceFault, match=r"/embed returned status 400: .*items: got an empty list"):
        Service(server.url).embed([])
    with pytest.raises(ServiceFault, match=r"/info returned status 404: .*not_found"):
        Service(f"{server.url}/nowhere").info()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("bundled", "--image", "/nowhere/demo.jpeg"),
        ("/nowhere/model",),
        ("bundled", "--url", "localhost:3000"),
        ("any", "--url", "http://127.0.0.1:9"),
        ("bundled", "--dtype", "float8"),
    ],
)
def test_invalid_arguments_are_a_usage_error(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
