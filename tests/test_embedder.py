"""`Embedder` as Python programs use it."""

from __future__ import annotations

import base64
import gc
import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from embedder import Embedder
from embedder.errors import EmbedderError, InvalidMedia, InvalidRequest, ModelUnavailable, UnsupportedDimensions
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import available_cores
from tests.conftest import encoded, picture


def test_forms_of_the_same_item_give_the_same_vector(embedder: Embedder) -> None:
    text = embedder.embed(["red", {"text": "red"}, {"text": ["red"]}, EmbeddingItem((Text("red"),))])
    png = encoded(picture(70, 50))
    b64 = base64.b64encode(png).decode()
    forms = [PIL.Image.open(io.BytesIO(png)), {"image": png}, {"image": b64}]
    forms += [{"image": f"data:image/png;base64,{b64}"}, {"content": [{"type": "image", "image": png}]}]
    image = embedder.embed(forms)
    assert all(np.abs(vector - text[0]).max() <= 1e-6 for vector in text)
    assert all(np.abs(vector - image[0]).max() <= 1e-6 for vector in image)


def test_vectors_are_float32_of_unit_length(embedder: Embedder) -> None:
    for vector in embedder.embed(["red", {"image": picture(64, 64)}], dimensions=64):
        assert vector.dtype == np.float32
        assert vector.shape == (64,)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_options_of_an_item_take_precedence_over_those_of_the_call(embedder: Embedder) -> None:
    own = {"text": "red", "instruction": "Find it.", "dimensions": 64}
    vectors = embedder.embed([own, "red"], instruction="Look.", dimensions=128)
    assert [len(vector) for vector in vectors] == [64, 128]
    expected = embedder.embed([own])[0]
    assert np.abs(vectors[0] - expected).max() <= 1e-6


def test_instruction_changes_the_vector_and_the_default_is_the_published_one(embedder: Embedder) -> None:
    plain, default, other = embedder.embed(
        ["red", {"text": "red", "instruction": "Represent the user's input."}, {"text": "red", "instruction": "Other."}]
    )
    assert np.abs(plain - default).max() <= 1e-6
    assert np.abs(plain - other).max() > 1e-3


def test_queries_and_documents_have_the_published_instructions(embedder: Embedder) -> None:
    query, document = embedder.embed([{"text": "red", "instruction": QUERY_INSTRUCTION}, "red"])
    for array, expected in ((embedder.embed_query, query), (embedder.embed_document, document)):
        assert array("red").shape == query.shape
        assert array(["red", "green"], dimensions=64).shape == (2, 64)
        assert array([], dimensions=64).shape == (0, 64)
        np.testing.assert_allclose(array("red"), expected, atol=1e-6)


def test_arrays_of_texts_and_of_pictures_are_lists(embedder: Embedder) -> None:
    """A column of a table is an array of texts."""
    texts, pictures = np.array(["red", "green"]), np.zeros((2, 64, 64, 3), np.uint8)
    for array in (texts, texts.astype(object), pictures):
        np.testing.assert_allclose(embedder.embed(array), embedder.embed(list(array)), atol=1e-6)  # type: ignore[arg-type]
        assert embedder.embed_document(array).shape == (2, 192)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"item 0: got uint8; allowed: a text"):
        embedder.embed(np.zeros(3, np.uint8))


@pytest.mark.parametrize("item", ["red", {"text": "red"}, picture(4, 4)], ids=lambda item: type(item).__name__)
def test_single_item_in_place_of_a_list_is_refused_with_the_right_form(item: Any, embedder: Embedder) -> None:
    with pytest.raises(InvalidRequest, match=r"allowed: a list of items, as in embed\(\[item\]\)$"):
        embedder.embed(item)


def test_errors_are_returned_in_the_place_of_their_vectors(embedder: Embedder) -> None:
    items: list[Any] = ["red", {"image": b"%PDF-1.7"}, 5, "green", {"text": "blue", "dimensions": 5000}, ""]
    results = embedder.embed(items, errors="return")
    kinds = [type(result) for result in results]
    assert kinds == [np.ndarray, InvalidMedia, InvalidRequest, np.ndarray, UnsupportedDimensions, InvalidRequest]
    assert [result.item for result in results if isinstance(result, EmbedderError)] == [1, 2, 4, 5]
    np.testing.assert_allclose(np.stack([results[0], results[3]]), embedder.embed(["red", "green"]), atol=1e-6)


def test_progress_is_shown_if_asked_for(embedder: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    embedder.embed(["red", "green"])
    assert not any(capsys.readouterr())
    for embed in (embedder.embed, embedder.embed_query, embedder.embed_document):
        embed(["red", "green"], show_progress_bar=True)
        assert "2/2" in capsys.readouterr().err


def test_error_has_the_index_of_its_item(embedder: Embedder) -> None:
    with pytest.raises(
        InvalidMedia,
        match=r"^item 2: image: not a JPEG, PNG, .*AVIF, TIFF, ICO or HEIC file, but a PDF document",
    ):
        embedder.embed(["red", "green", {"image": b"%PDF-1.7 ..."}, "blue"])
    with pytest.raises(UnsupportedDimensions, match=r"^item 1: dimensions: got 5000"):
        embedder.embed(["red", {"text": "green", "dimensions": 5000}])
    with pytest.raises(InvalidRequest, match=r"^item 0: got int; allowed: a text"):
        embedder.embed([5])  # type: ignore[list-item]
    assert len(embedder.embed(["still works"])) == 1


def test_call_may_have_more_items_than_the_queue_holds(random_checkpoint: Path) -> None:
    with Embedder(str(random_checkpoint), device="cpu", max_queued_tokens=200) as embedder:
        assert len(embedder.embed([f"text {index}" for index in range(100)])) == 100


def test_call_keeps_only_the_vectors_of_finished_items(random_checkpoint: Path) -> None:
    def count_futures() -> int:
        gc.collect()  # those of tests before
        return sum(type(one) is Future for one in gc.get_objects())

    num_futures = [count_futures()]

    def texts() -> Iterator[str]:
        yield from ["red"] * 599
        num_futures.append(count_futures())
        yield "red"

    with Embedder(str(random_checkpoint), device="cpu", max_queued_tokens=2048, max_input_tokens=1024) as small:
        assert len(small.embed(texts())) == 600
    assert num_futures[1] - num_futures[0] < 200  # the queue holds 68 items


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("no/such/folder", "neither a folder nor a hub id"),
        ("./missing", "neither a folder nor a hub id"),
        ("owner/name-that-is-not-there", "could not be downloaded"),
    ],
)
def test_missing_model_is_an_error(model: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match=reason):
        Embedder(model)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelUnavailable, match="model_type 'bert'; only qwen3_vl"):
        Embedder(str(tmp_path))


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import sys, embedder; print(sorted({'torch', 'transformers', 'torchvision'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(available_cores() < 2 or not Path("/proc/self/task").is_dir(), reason="needs two cores, and Linux")
def test_threads_that_load_the_model_end() -> None:
    """Otherwise OpenMP has more threads than cores and becomes slow. Embedding starts its own threads."""
    program = """
import os, threading, time, torch
from embedder import Embedder
torch.set_num_threads(torch.get_num_threads())  # starts torch's own pool
count = lambda: len(os.listdir("/proc/self/task")) - threading.active_count()
before = count()
with Embedder() as embedder:
    deadline = time.monotonic() + 10
    while count() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread of the system outlives Python's thread for a moment
    loaded = count()
    embedder.embed(["red"])
    print(loaded - before, count() > loaded)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "0 True"
