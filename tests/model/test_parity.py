"""Our packed forward against plain transformers, padded, on random weights of the true architecture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from numpy.typing import NDArray

from embedder import Embedder
from tests.conftest import picture, slow_except, words
from tests.oracle import Oracle

MAX_DIFFERENCE = 1e-5  # float32, against the oracle
MAX_BATCH_DIFFERENCE = 1e-6  # float32, of one item alone and among others

ITEMS: dict[str, dict[str, Any]] = {
    "one word": {"text": "red"},
    "long text": {"text": words(400)},
    "text with newlines": {"text": "\n\n  a list:\n- one\n- two\n\n"},
    "not Latin": {"text": "猫は赤い 🟥 e\u0301"},
    "instruction": {"text": "red", "instruction": "Retrieve images or text relevant to the user's query."},
    "portrait": {"image": picture(90, 200, 1)},
    "landscape": {"image": picture(333, 120, 2)},
    "tiny": {"image": picture(3, 5, 3)},
    "1:190": {"image": picture(8, 1520, 4)},
    "190:1": {"image": picture(1520, 8, 5)},
    "several images": {"image": [picture(64, 64, 6), picture(300, 40, 7), picture(100, 100, 8)]},
    "image and text": {"image": picture(128, 96, 9), "text": "what the picture shows"},
    "mixed order": {
        "content": [
            {"type": "text", "text": "before "},
            {"type": "image", "image": picture(200, 150, 10)},
            {"type": "text", "text": " between\n"},
            {"type": "image", "image": picture(60, 60, 11)},
            {"type": "text", "text": " after"},
        ]
    },
    "clip": {"video": [picture(128, 64, seed) for seed in range(5)]},
    "clip and text": {"video": [picture(64, 128, seed) for seed in range(2)], "text": "what moves"},
}


def cosines(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    return (ours.astype(np.float64) * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)


def assert_equal(ours: list[NDArray[np.float32]], theirs: NDArray[np.float32]) -> None:
    assert cosines(np.stack(ours), theirs).min() >= 0.99999
    assert np.abs(np.stack(ours) - theirs).max() <= MAX_DIFFERENCE


@pytest.fixture(scope="module")
def oracle(random_checkpoint: Path) -> Oracle:
    return Oracle(random_checkpoint)


@pytest.mark.parametrize("name", ITEMS)
def test_item_alone_equals_transformers(name: str, embedder: Embedder, oracle: Oracle) -> None:
    assert_equal(embedder.embed([ITEMS[name]]), oracle.embed([ITEMS[name]]))


def test_batch_of_everything_equals_padded_transformers(embedder: Embedder, oracle: Oracle) -> None:
    items = list(ITEMS.values())
    assert_equal(embedder.embed(items), oracle.embed(items))


@pytest.mark.parametrize("order", slow_except(range(3), 0))
def test_vector_does_not_depend_on_its_63_neighbors(order: int, embedder: Embedder) -> None:
    items = list(ITEMS.values())
    strangers = [{"text": words(1 + seed * 3, seed)} for seed in range(64 - len(items))]
    alone = [embedder.embed([item])[0] for item in items]
    crowd = np.random.default_rng(order).permutation(64)
    everything = [*items, *strangers]
    vectors = embedder.embed([everything[index] for index in crowd])
    found = {int(index): vector for index, vector in zip(crowd, vectors, strict=True)}
    difference = max(np.abs(found[index] - vector).max() for index, vector in enumerate(alone))
    assert difference <= MAX_BATCH_DIFFERENCE


SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"tied": False},
    "without the prefix in its keys": {"prefixed": False},
    "one key-value head": {"text": {"num_key_value_heads": 1}},
    "as many key-value heads as heads": {"text": {"num_key_value_heads": 6}},
    "heads wider than the model": {"text": {"num_attention_heads": 8, "head_dim": 64, "mrope_section": [12, 10, 10]}},
    "no deepstack": {"vision": {"deepstack_visual_indexes": []}},
    "deepstack of every layer": {"vision": {"deepstack_visual_indexes": [0, 1, 2, 3]}},
    "more deepstack than language layers": {
        "text": {"num_hidden_layers": 2},
        "vision": {"deepstack_visual_indexes": [0, 1, 3]},
    },
    "one language layer": {"text": {"num_hidden_layers": 1}},
    "a large position grid": {"vision": {"num_position_embeddings": 2304}},
    "without a processor config": {"processor_config": False},
}


@pytest.mark.parametrize("name", SHAPES)
def test_architecture_equals_transformers(
    name: str, write_random: Callable[..., Path], random_checkpoint: Path
) -> None:
    folder = write_random(**SHAPES[name])
    oracle = Oracle(folder, processor=random_checkpoint)
    items = [ITEMS[item] for item in ("one word", "landscape", "mixed order", "clip")]
    with Embedder(str(folder), device="cpu") as embedder:
        assert_equal(embedder.embed(items), oracle.embed(items))


@pytest.mark.parametrize("max_pixels", [65_536, 200_000])
def test_another_maximum_equals_transformers(max_pixels: int, random_checkpoint: Path) -> None:
    oracle = Oracle(random_checkpoint, max_pixels=max_pixels)
    large = {"image": picture(600, 500)}
    with Embedder(str(random_checkpoint), device="cpu", max_pixels=max_pixels) as embedder:
        vectors = embedder.embed([large])
    assert_equal(vectors, oracle.embed([large]))


def test_long_text_is_cut_inside_the_text(random_checkpoint: Path, oracle: Oracle) -> None:
    item = {"text": words(1000)}
    with Embedder(str(random_checkpoint), device="cpu", max_input_tokens=100) as embedder:
        assert_equal(embedder.embed([item]), oracle.embed([item], max_tokens=100))


@pytest.mark.slow
def test_bfloat16_stays_near_float32(random_checkpoint: Path, oracle: Oracle) -> None:
    items = list(ITEMS.values())
    with Embedder(str(random_checkpoint), device="cpu", dtype="bfloat16") as embedder:
        vectors = np.stack(embedder.embed(items))
    assert cosines(vectors, oracle.embed(items)).min() >= 0.999


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_transformers_own(random_checkpoint: Path, oracle: Oracle) -> None:
    items = list(ITEMS.values())
    exact = oracle.embed(items)
    theirs = cosines(Oracle(random_checkpoint, dtype=torch.bfloat16).embed(items), exact)
    with Embedder(str(random_checkpoint), device="cpu", dtype="bfloat16") as embedder:
        ours = cosines(np.stack(embedder.embed(items)), exact)
    assert (1 - ours).mean() <= 1.5 * (1 - theirs).mean()


def test_matryoshka_cut_is_the_first_values_at_unit_length(embedder: Embedder) -> None:
    whole = embedder.embed(["red"])[0]
    cut = embedder.embed([{"text": "red", "dimensions": 64}])[0]
    assert cut.shape == (64,)
    np.testing.assert_allclose(cut, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-7)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.slow
def test_compiled_layers_equal_transformers_whatever_the_number_of_tokens(
    random_checkpoint: Path, oracle: Oracle
) -> None:
    items = list(ITEMS.values())
    with (
        Embedder(str(random_checkpoint), device="cpu", execution="compiled") as embedder,
        torch._dynamo.config.patch(error_on_recompile=True),  # the start has compiled all
    ):
        assert_equal(embedder.embed(items), oracle.embed(items))
        alone = [embedder.embed([item])[0] for item in items]
    assert_equal(alone, oracle.embed(items))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_with_int8_weights_equal_the_eager_ones(dtype: Any, random_checkpoint: Path) -> None:
    items = list(ITEMS.values())
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "weights": "int8"}
    with Embedder(str(random_checkpoint), **options) as eager:
        expected = np.stack(eager.embed(items))
    with Embedder(str(random_checkpoint), **options, execution="compiled") as embedder:
        with torch._dynamo.config.patch(error_on_recompile=True):
            vectors = np.stack(embedder.embed(items))
            alone = np.concatenate([embedder.embed([item]) for item in items])
        assert embedder.info()["weights"] == "int8"
    minimum = 1 - (1e-6 if dtype == "float32" else 1e-3)
    assert float((vectors * expected).sum(1).min()) >= minimum
    assert float((alone * vectors).sum(1).min()) >= minimum


@pytest.mark.slow
def test_layers_that_cannot_be_compiled_stop_the_start(random_checkpoint: Path, tmp_path: Path) -> None:
    program = f"from embedder import Embedder; Embedder({str(random_checkpoint)!r}, device='cpu', execution='compiled')"
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "ModelUnavailable: EMBEDDER_EXECUTION=compiled: the layers cannot be compiled: " in run.stderr
    assert "no-such-compiler" in run.stderr.strip().splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["varlen", "flash_attn"])
def test_cuda_back_ends_equal_the_oracle_in_bfloat16(attention: str, random_checkpoint: Path, oracle: Oracle) -> None:
    if attention == "flash_attn":
        pytest.importorskip("flash_attn")
    items = list(ITEMS.values())
    with Embedder(str(random_checkpoint), device="cuda", attention=attention) as embedder:
        assert cosines(np.stack(embedder.embed(items)), oracle.embed(items)).min() >= 0.999
