"""`python -m embedder.verify` reports what is right, what is wrong, and what it did not check."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
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
from transformers import Qwen3VLModel

from embedder import Embedder
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.verify import checks, published
from embedder.verify.__main__ import main
from embedder.verify.checks import verify
from embedder.verify.examples import Examples, Input
from embedder.verify.http_service import Service, ServiceFault
from embedder.verify.published import FirstValues
from embedder.verify.published_checks import Published, check_published_embeddings
from tests.conftest import ROOT, Server, encoded, picture, slow_except, words

Vector = NDArray[np.float32]
Answer = Callable[[str, list[Any], int | None], list[Vector]]  # of path, items and dimensions
Score = Callable[[Any, Any, str | None], float]  # of query, document and instruction


def no_score(*_: Any) -> float:
    raise AssertionError("this service has no reranker")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """The exit status, and the verdict of each row."""
    status = main(arguments)
    header, *rows, total = capsys.readouterr().out.splitlines()
    start = header.index("verdict")
    verdicts = {re.split("  +", row)[0]: row[start:] for row in rows}
    assert len(verdicts) == len(rows)
    counts = [int(count) for count in re.findall(r"\d+", total)]
    kinds = ("ok", "FAILED", "differs", "not run", "not checked")
    assert counts == [sum(one.startswith(kind) for one in verdicts.values()) for kind in kinds]
    return status, verdicts


def failed(verdicts: dict[str, str]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict == "FAILED"}


def not_run(verdicts: dict[str, str]) -> dict[str, str]:
    return {
        name: verdict.removeprefix("not run: ") for name, verdict in verdicts.items() if verdict.startswith("not run: ")
    }


def unchecked(verdicts: dict[str, str]) -> dict[str, str]:
    found = {name: verdict.removeprefix("not checked: ") for name, verdict in verdicts.items()}
    return {name: why for name, why in found.items() if why != verdicts[name]}


@contextmanager
def stub(answer: Answer, score: Score = no_score, **info: Any) -> Iterator[str]:
    """Run a server with the four routes and yield its URL; `answer` makes the vectors, `score` the scores."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"model": "stub", "hidden_size": 192, "dtype": "float32", **info})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/rerank":
                scores = [score(body["query"], document, body["instruction"]) for document in body["documents"]]
                self._send({"results": [{"index": index, "score": one} for index, one in enumerate(scores)]})
                return
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


PUBLISHED = [f"published: {one.name}" for one in (*published.EMBEDDINGS, *published.SCORES)]
NEEDS_A_FOLDER = {"prompt end", "token ids", "library = transformers", "service = library"}
NOT_WANTED = dict.fromkeys(PUBLISHED, "needs --examples FOLDER")


@pytest.mark.slow
def test_bundled_model_passes_as_a_command() -> None:
    command = [sys.executable, "-m", "embedder.verify", "bundled", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 ok, 0 failed, 0 differs, 0 not run, 16 not checked" in done.stdout
    assert re.search(r"^library = transformers, image +[01]\.\d+ +>= 0\.99999 +ok$", done.stdout, re.MULTILINE)


def test_random_checkpoint_passes(random_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, verdicts = run(capsys, str(random_checkpoint), "--device", "cpu")
    assert status == 0
    assert not failed(verdicts)
    assert not_run(verdicts) == NOT_WANTED
    assert unchecked(verdicts) == {"service = library": "no --url was given"}


@pytest.mark.slow
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
    assert not_run(verdicts) == NOT_WANTED
    assert not unchecked(verdicts)
    assert {f"service = {other}, {kind}" for other in ("library", "transformers") for kind in ("text", "image")} <= set(
        verdicts
    )


def test_service_without_its_folder_is_checked_over_http_only(
    server: Server, random_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, verdicts = run(capsys, random_checkpoint.name, "--url", server.url)
    assert status == 0
    assert not_run(verdicts) == NOT_WANTED
    assert unchecked(verdicts) == dict.fromkeys(NEEDS_A_FOLDER, "MODEL is not a folder on this machine")


@pytest.mark.slow
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
    model = Qwen3VLModel.from_pretrained(random_checkpoint, dtype=torch.float32)

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


@pytest.mark.parametrize(
    "fault",
    slow_except(
        WRONG, "no template", "not normalized", "instruction dropped", "another order", "one route without template"
    ),
)
def test_server_with_one_fault_fails_the_check_for_it(
    fault: str, embedder: Embedder, raw_text: Callable[[str], Vector], capsys: pytest.CaptureFixture[str]
) -> None:
    with stub(wrong_answer(fault, embedder, raw_text)) as url:
        status, verdicts = run(capsys, "stub", "--url", url)
    assert status == 1
    assert WRONG[fault] <= failed(verdicts)
    if fault != "another order":
        assert failed(verdicts) - {"default instruction"} == WRONG[fault] - {"default instruction"}


@pytest.mark.parametrize(
    ("fault", "failures"),
    [
        ("no template", TEXTS),
        pytest.param("blind", IMAGES, marks=pytest.mark.slow),
        pytest.param("nothing", set(), marks=pytest.mark.slow),
    ],
)
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


# The published values


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the form of the authors' `examples/`, with other texts and pictures."""
    folder = tmp_path_factory.mktemp("examples")
    results = folder / "retrieval_results"
    (results / "images").mkdir(parents=True)
    for index in range(10):
        (results / "images" / f"img_{index}.jpg").write_bytes(encoded(picture(64, 64, index), "JPEG"))
    for seed, name in enumerate(("demo.jpeg", "car.jpg", "bee.jpg"), 10):
        (folder / name).write_bytes(encoded(picture(64, 64, seed), "JPEG"))
    captions = {"results": [{"caption": f"the colors of picture {index} "} for index in (0, 9)]}
    passages = {
        "corpus": [f"passage {index}: {words(8, index)}" for index in range(821)],
        "results": [{"query": "red or blue"}, {"query": "how green"}],
    }
    for name, content in (("image", captions), ("text", passages)):
        (results / f"{name}_retrieval_results.pkl").write_bytes(pickle.dumps(content, protocol=4))
    return folder


def key(item: Any) -> str:
    return json.dumps(item, sort_keys=True)


def vectors_with_the_published_values(examples: Path) -> dict[str, Vector]:
    """Unit vectors of all inputs, by `key`, that have every published similarity, and the first values.

    Each group of inputs has axes of its own, which the first values do not touch.
    """
    read = Examples(examples)
    num_first = 13
    axes = itertools.count(num_first)
    vectors: dict[str, Vector] = {}
    gram: dict[tuple[str, str], float] = {}
    for example in published.EMBEDDINGS:
        if isinstance(example, published.Similarities):
            for left, right, value in example.values:
                gram[key(read.item(left)), key(read.item(right))] = value
    names = list(dict.fromkeys(name for pair in gram for name in pair))
    neighbors = {name: {a if b == name else b for a, b in gram if name in (a, b)} for name in names}
    # Inputs that are compared with many others are chosen first; the others are built on their axes.
    demo = key(read.item(Input(image="demo.jpeg")))
    for name in sorted(names, key=lambda name: (name != demo, -len(neighbors[name]))):
        known = [other for other in neighbors[name] if other in vectors]
        basis = np.stack([vectors[other] for other in known]) if known else np.zeros((0, 2048))
        wanted = np.array([gram.get((name, other), gram.get((other, name))) for other in known])
        vector = np.linalg.lstsq(basis, wanted, rcond=None)[0] if known else np.zeros(2048)
        if name == demo:
            vector[:num_first] = next(one for one in published.EMBEDDINGS if isinstance(one, FirstValues)).values
        vector[next(axes)] = np.sqrt(1 - vector @ vector)
        vectors[name] = vector
    return vectors


def published_scores(examples: Path) -> dict[str, float]:
    read = Examples(examples)
    return {
        key([read.item(example.query), read.item(document), example.instruction]): score
        for example in published.SCORES
        for document, score in example.values
    }


@pytest.mark.parametrize("preprocessing", ["checkpoint", pytest.param("reference", marks=pytest.mark.slow)])
def test_model_with_the_published_values_passes(
    preprocessing: str, examples: Path, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors, scores = vectors_with_the_published_values(examples), published_scores(examples)

    def answer(path: str, items: list[Any], dimensions: int | None) -> list[Vector]:
        if all(key(item) in vectors for item in items):
            return [vectors[key(item)] for item in items]
        return [unit(np.pad(vector, (0, 2048 - 192))[:dimensions]) for vector in embedder.embed(items)]

    def score(*pair: Any) -> float:
        return scores[key(pair)]

    info = {"model": "Qwen/Qwen3-VL-Embedding-2B", "hidden_size": 2048, "preprocessing": preprocessing}
    judge = {"roles": ["embedder", "reranker"], "reranker": {"preprocessing": preprocessing}}
    with stub(answer, score, **info, **judge) as url:
        status, verdicts = run(capsys, "Qwen/Qwen3-VL-Embedding-2B", "--url", url, "--examples", str(examples))
        assert status == 0
        found = {name: verdicts[name] for name in PUBLISHED}
        assert set(found.values()) <= {
            "ok",
            f"not checked: the service has EMBEDDER_PREPROCESSING={preprocessing}; published with the other",
        }
        others = [one for one in (*published.EMBEDDINGS, *published.SCORES) if one.origin.regime != preprocessing]
        with_pictures = {f"published: {one.name}" for one in others if any(i.image for i in published.inputs_of(one))}
        assert {name for name in PUBLISHED if found[name] != "ok"} == with_pictures
        for name in scores:
            scores[name] += 0.04
        for name in vectors:
            vectors[name] = vectors[name] + 0.02
        status, wrong = run(capsys, "Qwen/Qwen3-VL-Embedding-2B", "--url", url, "--examples", str(examples))
        assert status == 1
        assert {name for name in PUBLISHED if wrong[name] == "differs"} == set(PUBLISHED) - with_pictures


@pytest.mark.slow
def test_random_checkpoints_differ_from_every_published_value(
    random_checkpoint: Path, random_reranker: Path, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(random_checkpoint), "--device", "cpu", "--examples", str(examples)]
    status, verdicts = run(capsys, *command, "--reranker", str(random_reranker))
    assert status == 1
    assert {name: verdicts[name] for name in PUBLISHED} == dict.fromkeys(PUBLISHED, "differs")
    assert not failed(verdicts)


def test_published_model_without_its_examples_is_no_success(
    embedder: Embedder, raw_text: Callable[[str], Vector], capsys: pytest.CaptureFixture[str]
) -> None:
    with stub(wrong_answer("nothing", embedder, raw_text), model="Qwen/Qwen3-VL-Embedding-2B") as url:
        status, verdicts = run(capsys, "Qwen/Qwen3-VL-Embedding-2B", "--url", url)
    embeddings = PUBLISHED[: len(published.EMBEDDINGS)]
    needs = {name for name in embeddings if verdicts[name].startswith("not run: needs --examples FOLDER with ")}
    assert needs == set(embeddings) - {"published: matrix: query, text"}
    assert status == 1  # of random weights
    assert verdicts["published: matrix: query, text"] == "differs"


class ConstantModel:
    """Embeds everything alike."""

    def embed(self, items: list[Any]) -> list[Vector]:
        return [np.ones(192, np.float32)] * len(items)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("demo.jpeg", None, "demo.jpeg does not exist"),
        ("demo.jpeg", b"no picture", "demo.jpeg: "),
        ("retrieval_results/text_retrieval_results.pkl", b"cos\nsystem\n(S'false'\ntR.", "holds os.system; allowed: "),
        ("retrieval_results/text_retrieval_results.pkl", b"version https://git-lfs", "is not a file of the examples"),
        ("retrieval_results/text_retrieval_results.pkl", pickle.dumps({"corpus": []}), "has nothing at ['"),
        ("retrieval_results/text_retrieval_results.pkl", pickle.dumps({"results": 3}), "has nothing at ['"),
    ],
)
def test_examples_that_cannot_be_read_are_named_and_no_success(
    name: str, content: bytes | None, message: str, examples: Path, tmp_path: Path, embedder: Embedder
) -> None:
    folder = Path(shutil.copytree(examples, tmp_path / "examples"))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    model: Any = embedder if content == b"no picture" else ConstantModel()
    rows = check_published_embeddings(model, {"dtype": "float32"}, Examples(folder))
    reasons = {row: check.verdict for row, check in rows.items() if check.verdict.startswith("not run: ")}
    kind = "picture" if name == "demo.jpeg" else "passages"
    assert {row for row in rows if kind in row and "ten pictures" not in row} == set(reasons)
    assert all(message in reason for reason in reasons.values()), reasons


def test_bundled_reranker_is_not_compared_with_the_published_one(examples: Path) -> None:
    model: Any = ConstantModel()
    info = {"roles": ["embedder", "reranker"], "reranker": {"is_bundled_model": True}, "dtype": "float32"}
    rows = Published(Examples(examples), True).check_service(model, info)[len(published.EMBEDDINGS) :]
    assert {row.verdict for row in rows} == {"not checked: the bundled model is not a published one"}


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
        ("bundled", "--examples", "/nowhere"),
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
