"""The quality commands: mteb with service and library, colors on any local service, and ablations."""

from __future__ import annotations

import base64
import http.server
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.drawings import drawings_of_the_demo
from benchmarks.quality import ablations, colors, neighbors, reranking, suite
from benchmarks.quality.color_data import COLORS, NAMES, ciede2000
from benchmarks.quality.local_schema import Client, Endpoint, LocalService, read_models
from benchmarks.quality.mteb_model import EmbedderModel, instruction_for, items_of, preprocessing_of
from benchmarks.quality.published import MMTEB
from benchmarks.quality.targets import Item, Library, RequestFailed, Service
from benchmarks.quality.tasks import LOCAL_TASKS
from benchmarks.quality.vectors import Vectors
from embedder import Embedder, Reranker
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.model.forward import Forward
from embedder.settings import Settings
from tests.conftest import ROOT, Server, encoded, picture

pytestmark = pytest.mark.slow

FEW = ["--count", "24"]
MAX_ITEMS = Settings().max_items_per_request


class Counted:
    """A target that records its items, and is interrupted after `last_call` calls."""

    def __init__(self, target: Library, last_call: int = 1_000_000) -> None:
        self.target, self.info, self.last_call = target, target.info, last_call
        self.contents: list[tuple[str | None, str | None, bytes]] = []
        self.num_calls = 0

    def embed(self, items: Sequence[Item], instruction: str | None = None) -> NDArray[np.float32]:
        self.num_calls += 1
        if self.num_calls > self.last_call:
            raise KeyboardInterrupt
        self.contents += [(instruction, item.get("text"), item.get("image", b"")) for item in items]
        return self.target.embed(items, instruction)


def run_mteb(folder: Path, *arguments: str) -> dict[str, Any]:
    """The report's JSON."""
    assert suite.main([*arguments, *FEW, "--output", str(folder / "kept"), "--results", str(folder)]) == 0
    data: dict[str, Any] = json.loads((folder / "mteb.json").read_text())
    return data


def test_mteb_scores_are_the_same_by_service_and_library(
    server: Server, random_checkpoint: Path, tmp_path: Path
) -> None:
    by_service = run_mteb(tmp_path / "service", "--url", server.url)
    by_library = run_mteb(tmp_path / "library", "--model", str(random_checkpoint))
    assert [row["task"] for row in by_service["tasks"]] == [f"{name}-24" for name in LOCAL_TASKS]
    for one, other in zip(by_service["tasks"], by_library["tasks"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-9)
    assert (by_service["through"], by_library["through"]) == ("service", "library")
    (own,) = (tmp_path / "service" / "kept" / "results").rglob("Swatches-24.json")  # the file of mteb
    assert json.loads(own.read_text())["scores"]["test"][0]["main_score"] * 100 == by_service["tasks"][1]["score"]
    card = json.loads((own.parent / "model_meta.json").read_text())["experiment_kwargs"]
    assert card == {"preprocessing": "checkpoint", "max_pixels": 1_310_720, "dtype": "float32"}
    assert {name: by_service[name] for name in card} == card
    shown = "".join((tmp_path / "library" / f"mteb.{kind}").read_text() for kind in ("json", "md"))
    assert "in float32. Images: preprocessing `checkpoint`, at most 1,310,720 pixels." in shown
    assert "/tmp" not in shown
    assert "/root" not in shown


def test_results_with_8_bit_weights_are_kept_apart(random_checkpoint: Path, embedder: Embedder, tmp_path: Path) -> None:
    tasks = [LOCAL_TASKS["Drawings"](6)]
    folders = []
    for kind in ("float32", "int8"):
        weights = "int8" if kind == "int8" else None
        with (
            Embedder(str(random_checkpoint), device="cpu", weights=weights) as model,  # type: ignore[arg-type]
            Vectors(Counted(Library(model)), tmp_path / kind) as vectors,
        ):
            suite.evaluate(EmbedderModel(vectors), tasks, tmp_path, batch_size=4)
            folders.append({one.parent for one in (tmp_path / "results").rglob("Drawings-6.json")})
    assert len(folders[0]) == 1
    assert len(folders[1]) == 2, "the second one has a folder of its own"
    assert "weights" not in preprocessing_of(embedder.info())
    assert preprocessing_of({**embedder.info(), "weights": "int8"})["weights"] == "int8"


def test_interrupted_run_is_resumed(embedder: Embedder, tmp_path: Path) -> None:
    tasks = [LOCAL_TASKS["Drawings"](24), LOCAL_TASKS["MirroredDrawings"](24)]
    ended = Counted(Library(embedder), last_call=13)  # one probe, 6 + 6 batches of the first task: within the second
    with Vectors(ended, tmp_path) as vectors, pytest.raises(KeyboardInterrupt):
        suite.evaluate(EmbedderModel(vectors), tasks, tmp_path, batch_size=4)
    resumed = Counted(Library(embedder))
    with Vectors(resumed, tmp_path) as vectors:
        scores = suite.evaluate(EmbedderModel(vectors), tasks, tmp_path, batch_size=4)
    whole = Counted(Library(embedder))
    with Vectors(whole, tmp_path / "whole") as vectors:
        expected = suite.evaluate(EmbedderModel(vectors), tasks, tmp_path / "whole", batch_size=4)
    probe = whole.contents[0]
    done, rest = set(ended.contents) - {probe}, set(resumed.contents) - {probe}
    assert done
    assert rest
    assert not done & rest, "nothing is embedded twice"
    assert done | rest == set(whole.contents) - {probe}
    assert len(whole.contents) == len(set(whole.contents))
    assert [one.get_score() for one in scores.task_results] == [one.get_score() for one in expected.task_results]
    again = Counted(Library(embedder))
    with Vectors(again, tmp_path) as vectors:
        suite.evaluate(EmbedderModel(vectors), tasks, tmp_path, batch_size=4)
    assert again.contents == [probe], "finished tasks are read"


def test_folder_of_other_weights_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    with Vectors(Library(embedder), tmp_path):
        pass

    class Other(Library):
        def embed(self, items: Sequence[Item], instruction: str | None = None) -> NDArray[np.float32]:
            return -super().embed(items, instruction)

    with pytest.raises(SystemExit, match="contains results of other weights or settings"):
        Vectors(Other(embedder), tmp_path)
    for change in ({"pixels": {"max": 1}}, {"preprocessing": "reference"}, {"raw_orientation": True}):
        other_pixels = Library(embedder)
        other_pixels.info = {**other_pixels.info, **change}
        with pytest.raises(SystemExit, match="other weights or settings"):
            Vectors(other_pixels, tmp_path)


def test_queries_and_documents_get_the_instructions_of_the_model_card() -> None:
    query, document = mteb.types.PromptType.query, mteb.types.PromptType.document
    own = LOCAL_TASKS["Swatches"](4).metadata
    assert instruction_for(own, query) == "Find the color."
    assert instruction_for(own, document) is None
    without = own.model_copy(update={"prompt": None})
    assert instruction_for(without, query) == QUERY_INSTRUCTION
    assert instruction_for(without, document) is None
    assert instruction_for(without, None) is None
    symmetric = own.model_copy(update={"prompt": "Say what it is about."})
    assert [instruction_for(symmetric, side) for side in (None, query, document)] == ["Say what it is about."] * 2 + [
        None
    ]


def test_images_are_encoded_without_loss() -> None:
    cmyk, rgba = picture(40, 40).convert("CMYK"), picture(50, 30, 1).convert("RGBA")
    items = list(items_of({"id": ["a", "b"], "text": ["one", "two"], "image": [cmyk, rgba]}))
    assert [sorted(item) for item in items] == [["image", "text"]] * 2
    back = [PIL.Image.open(io.BytesIO(item["image"])) for item in items]
    assert (back[0].mode, back[1].mode) == ("RGB", "RGBA")
    assert back[1].tobytes() == rgba.tobytes()


def test_requests_stay_within_the_services_limits(server: Server, embedder: Embedder) -> None:
    items: list[Item] = [{"text": str(index), "image": encoded(picture(40, 40, index))} for index in range(5)]
    with Service(server.url) as service:
        one_body = len(next(service._bodies(items[:1], {})))
        service.info["limits"] |= {"max_body_bytes": 2 * one_body + 1100, "max_items_per_request": 3}
        bodies = [json.loads(body)["items"] for body in service._bodies(items, {})]
        assert [len(body) for body in bodies] == [2, 2, 1]
        assert np.abs(service.embed(items) - Library(embedder).embed(items)).max() <= 1e-6
        with pytest.raises(RequestFailed, match=r"1 items of a request failed; the first error: .*text is empty"):
            service.embed([{"text": ""}, {"text": "a"}])


def test_published_scores_are_compared_with_a_complete_run_of_their_benchmark() -> None:
    rows = [{"task": "a", "metric": "ndcg", "score": 60.0}, {"task": "b", "metric": "ndcg", "score": 70.0}]
    figures = suite.compare("Qwen3-VL-Embedding-2B", rows, complete=MMTEB)
    assert figures[0] == {"figure": MMTEB, "published": 63.9, "ours": 65.0}
    assert all(figure["ours"] is None for figure in figures[1:])
    data = {
        **{"model": "2B", "through": "service", "dtype": "float32", "preprocessing": "checkpoint", "max_pixels": 4096},
        **{"tasks": rows, "published": figures, "not_run": {"c": "no hub"}},
    }
    text = suite.table(data)
    assert f"| {MMTEB} | 63.9 | 65.0 | +1.1 |" in text
    assert "NOT RUN: c: no hub" in text
    assert not suite.compare("bundled", rows, complete=None)


# Reranking


def test_both_orders_of_the_embedders_candidates_are_measured_and_read_again(
    random_checkpoint: Path,
    random_reranker: Path,
    embedder: Embedder,
    reranker: Reranker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = ["--model", str(random_checkpoint), "--reranker", str(random_reranker), "--candidates", "5"]
    tasks = ["--tasks", "Drawings", "MirroredDrawings", "--count", "12"]
    command = [*models, *tasks, "--output", str(tmp_path / "kept"), "--results", str(tmp_path)]
    assert reranking.main(command) == 0
    data = json.loads((tmp_path / "rerank.json").read_text())
    found = {(row["task"], row["order"]): row for row in data["tasks"]}
    assert len(found) == 4
    names, pictures = drawings_of_the_demo()
    names, pictures = names[:12], pictures[:12]
    similarity = np.stack(embedder.embed(names, instruction="Find the drawing.")) @ np.stack(embedder.embed(pictures)).T
    candidates = [np.argsort(-row, kind="stable")[:5].tolist() for row in similarity]
    for order in ("embedder", "reranker"):
        inverse_ranks = []
        for wanted, chosen in enumerate(candidates):
            if order == "reranker":
                documents = [pictures[place] for place in chosen]
                judged = reranker.rank(names[wanted], documents, instruction="Find the drawing.")
                chosen = [chosen[one.index] for one in judged]
            inverse_ranks.append(1 / (1 + chosen.index(wanted)) if wanted in chosen else 0.0)
        row = found["Drawings-12", order]
        assert row["mrr"] == pytest.approx(100 * np.mean(inverse_ranks), abs=0.01)
        assert row["map"] == pytest.approx(row["mrr"], abs=0.01), "one document is relevant"
        assert row["nDCG@10"] >= row["mrr"] - 0.01
    assert found["Drawings-12", "embedder"] != found["Drawings-12", "reranker"]
    text = (tmp_path / "rerank.md").read_text()
    assert "the embedder's first 5 are ordered" in text
    assert "/tmp" not in text

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(reranking.RerankerModel, "predict", refuse)
    assert reranking.main(command) == 0
    assert json.loads((tmp_path / "rerank.json").read_text())["tasks"] == data["tasks"]
    fewer = [*models[:-1], "4", *tasks, "--output", str(tmp_path / "kept"), "--results", str(tmp_path / "fewer")]
    assert reranking.main(fewer) == 1, "other candidates are other results"
    failed = json.loads((tmp_path / "fewer" / "rerank.json").read_text())
    assert list(failed["not_run"]) == ["Drawings-12", "MirroredDrawings-12"]
    assert "computed again" in (tmp_path / "fewer" / "rerank.md").read_text()


def test_tasks_that_bring_candidates_keep_them(embedder: Embedder, reranker: Reranker, tmp_path: Path) -> None:
    """As mteb's tasks of the type Reranking do."""
    task = LOCAL_TASKS["Swatches"](6)
    task.metadata = task.metadata.model_copy(update={"type": "Reranking"})
    split = task.dataset["default"]["test"]
    split["top_ranked"] = {f"q{row}": [f"d{row}", f"d{(row + 1) % 6}"] for row in range(6)}
    asked: list[list[str]] = []

    class Recorded(reranking.RerankerModel):
        def predict(self, inputs1: Any, inputs2: Any, **options: Any) -> NDArray[np.float64]:
            asked.append([text for batch in inputs1 for text in batch["text"]])
            return super().predict(inputs1, inputs2, **options)

    with Vectors(Library(embedder), tmp_path) as vectors:
        models = EmbedderModel(vectors), Recorded(reranker)
        rows, failures = reranking.measure([task], models, tmp_path, candidates=1, batch_size=4)
    assert not failures
    assert len(asked[0]) == 12
    assert [row["order"] for row in rows] == ["embedder", "reranker"]
    assert all(row["mrr"] >= 50 for row in rows), "the right one is among two"


# Colors. The second service shares no code with ours: it knows each name's RGB, but confuses every tenth with the next.

NUM_COLORS = 60
KNOWN = dict(zip(NAMES, COLORS.tolist(), strict=True))
CONFUSED = range(0, NUM_COLORS, 10)


class MeanColor(http.server.BaseHTTPRequestHandler):
    """A service whose vectors are mean RGB values: up to 7 texts or one image per request, other paths and fields."""

    num_refusals = 2

    def do_GET(self) -> None:
        array = {"type": "array", "items": {"type": "string"}, "maxItems": 7}
        schema = {"properties": {"words": {"anyOf": [{"type": "string"}, array]}}}
        body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Words"}}}}
        paths = {"/t": {"post": {"requestBody": body}}, "/i": {"post": {}}}
        found = self.path == "/docs.json"
        self.answer(200 if found else 404, {"paths": paths, "components": {"schemas": {"Words": schema}}})

    def do_POST(self) -> None:
        fields = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if MeanColor.num_refusals:
            MeanColor.num_refusals -= 1
            self.answer(429, {"error": "rate limit"})
        elif self.path == "/t":
            assert len(fields["words"]) <= 7
            self.answer(200, {"vector": [self.of_name(name) for name in fields["words"]]})
        else:
            pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(fields["picture"]))).convert("RGB"))
            self.answer(200, {"out": [*pixels.reshape(-1, 3).mean(axis=0), 255]})

    def of_name(self, name: str) -> list[int]:
        index = NAMES.index(name)
        return [*KNOWN[NAMES[index + 1] if index in CONFUSED else name], 255]

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def mean_color() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), MeanColor) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def models_yaml(url: str) -> str:
    return f"""
defaults: {{timeout: 60}}
models:
  someone-elses: {{provider_type: openai, model: text-embedding-3-large}}
  mean-color:
    provider_type: local
    base_url: {url}
    text_endpoint:  {{path: /t, method: POST, input_field: words, output_field: vector}}
    image_endpoint: {{path: /i, method: POST, input_field: picture, output_field: out}}
"""


def test_colors_of_our_service_and_another_one_are_compared(server: Server, mean_color: str, tmp_path: Path) -> None:
    models = tmp_path / "models.yaml"
    models.write_text(models_yaml(mean_color))
    arguments = ["--models", str(models), "--url", f"ours={server.url}", "--url", "none=http://127.0.0.1:9"]
    assert colors.main([*arguments, "--colors", str(NUM_COLORS), "--results", str(tmp_path)]) == 1
    data = json.loads((tmp_path / "colors.json").read_text())
    assert list(data["not_measured"]) == ["none"]
    assert list(data["services"]) == ["mean-color", "ours"]
    known, ours = data["services"]["mean-color"], data["services"]["ours"]
    share = len(CONFUSED) / NUM_COLORS
    assert known["recall_at_1"] == pytest.approx(1 - share)
    assert known["distance_median"] == pytest.approx(0, abs=1e-6)
    vectors = np.hstack([COLORS[:NUM_COLORS].astype(float), np.full((NUM_COLORS, 1), 255)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    confused = [1 - vectors[index] @ vectors[index + 1] for index in CONFUSED]
    assert known["distance_mean"] == pytest.approx(sum(confused) / NUM_COLORS, rel=1e-3)
    assert known["spearman_swatches"] > 0.6
    assert known["dimensions"] == 4
    assert ours["dimensions"] == 192
    assert ours["recall_at_1"] < 0.3, "random weights"
    assert abs(ours["spearman_names_swatches"]) < 0.3
    assert (tmp_path / "colors.png").read_bytes().startswith(b"\x89PNG")
    assert "| mean-color | 4 |" in (tmp_path / "colors.md").read_text()


def test_models_yaml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(models_yaml("http://localhost:8003"))
    text, image = Endpoint("/t", "POST", "words", "vector"), Endpoint("/i", "POST", "picture", "out")
    assert read_models(path) == [LocalService("mean-color", "http://localhost:8003", text, image)]


def test_batch_size_is_read_from_the_services_document(server: Server, mean_color: str) -> None:
    with Client(LocalService("ours", server.url)) as client:
        assert [client.max_items(one) for one in (client.service.text, client.service.image)] == [MAX_ITEMS, MAX_ITEMS]
    text, image = Endpoint("/t", "POST", "words", "vector"), Endpoint("/i", "POST", "picture", "out")
    with Client(LocalService("other", mean_color, text, image)) as client:
        assert [client.max_items(one) for one in (text, image)] == [7, 1]


def test_colors_without_a_service_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        colors.main([])
    assert "no services: give --url" in capsys.readouterr().err


def test_color_difference_is_ciede2000_under_d65() -> None:
    differences = ciede2000(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8))
    expected = [[0, 86.61, 52.88], [86.61, 0, 83.19], [52.88, 83.19, 0]]  # published values for the primaries of sRGB
    assert differences == pytest.approx(np.array(expected), abs=0.01)


# Ablations


@pytest.mark.slow
def test_ablations_report_every_setting(tmp_path: Path) -> None:
    few = ["--compositions", "60", "--count", "12", "--pictures", "1", "--results", str(tmp_path)]
    assert ablations.main(few) == 0
    data = json.loads((tmp_path / "ablations.json").read_text())
    assert {(row["output_dtype"], row["dimensions"], row["bytes"]) for row in data["types"]} >= {
        ("float32", 192, 768),
        ("int8", 64, 64),
        ("binary", 128, 16),
    }
    assert list(data["instructions"]) == [ablations.DEFAULT, *ablations.INSTRUCTIONS]
    assert 0.99 < data["dtypes"]["least_cosine"] < 1 - 1e-7
    pixels = {row["regime"]: row for row in data["pixels"]}
    assert pixels[ablations.USUAL]["least_cosine"] == pytest.approx(1, abs=1e-6)
    assert pixels["a quarter"]["least_cosine"] < 1 - 1e-4
    found = data["neighbors"]
    assert found["num_compositions"] == 60
    assert found["mean_together"] > 1.2, "or nothing was shown"
    assert 0 < found["worst"]["difference"] <= 1e-6
    text = (tmp_path / "ablations.md").read_text()
    assert f"Largest difference of any value from the single item: {found['worst']['difference']:.2e}, within" in text
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")


def test_item_that_depends_on_its_batch_is_detected(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of three or more, the last item gets a small part of the first."""
    forward = Forward.__call__

    def leak(self: Forward, batch: Any) -> Any:
        states = forward(self, batch)
        return torch.cat([states[:-1], states[-1:] + 1e-4 * states[:1]]) if len(states) > 2 else states

    monkeypatch.setattr(Forward, "__call__", leak)
    found = neighbors.measure(embedder, 20)
    assert not found["is_within"]
    assert found["worst"]["difference"] > 1e-6
    assert "NOT WITHIN" in neighbors.text_of(found)


# The command


def test_help_exits_with_0_and_an_unknown_command_with_1() -> None:
    def quality(argument: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.quality", argument]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    shown, unknown = quality("--help"), quality("color")
    assert shown.returncode == 0
    assert "python -m benchmarks.quality ablations" in shown.stdout
    assert unknown.returncode == 1
    assert "got 'color' as COMMAND; allowed: colors, mteb, rerank, ablations, report" in unknown.stderr
