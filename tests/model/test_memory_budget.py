"""What fits the device at once is found by trying, with texts and with pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embedder import Embedder
from embedder.errors import DeviceOutOfMemory, ModelUnavailable
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.loaded_model import EmbeddingModel
from embedder.model.memory_budget import find_budget
from embedder.models import Models
from embedder.settings import Settings


@pytest.fixture
def preprocessor(random_checkpoint: Path) -> Preprocessor:
    settings = Settings(max_batch_tokens=4096, max_input_tokens=1024)
    return Preprocessor(load_tokenizer(random_checkpoint), read_vision_config(random_checkpoint, settings), settings)


def device(text_tokens: int, picture_tokens: int) -> tuple[list[int], Callable[[list[ModelInput]], None]]:
    """A device that holds so many, and the costs of the batches that went through."""
    costs: list[int] = []

    def run(inputs: list[ModelInput]) -> None:
        cost = sum(one.cost for one in inputs)
        if cost > (picture_tokens if inputs[0].patches else text_tokens):
            raise DeviceOutOfMemory("full")
        costs.append(cost)

    return costs, run


@pytest.mark.parametrize(
    ("text_tokens", "picture_tokens", "expected"),
    [(10**6, 10**6, 4096), (4096, 3000, 2048), (1100, 10**6, 1024), (300, 300, 256), (70, 70, 64)],
)
def test_budget_is_what_both_kinds_fit(
    preprocessor: Preprocessor, text_tokens: int, picture_tokens: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    costs, run = device(text_tokens, picture_tokens)
    with caplog.at_level(logging.WARNING):
        assert find_budget(preprocessor, run) == expected
    assert ("batches have at most" in caplog.text) == (expected < 4096)
    assert ("lower EMBEDDER_MAX_INPUT_TOKENS" in caplog.text) == (expected < 1024)
    assert all(expected / 2 < cost <= expected for cost in costs[-2:])


def test_device_without_room_for_a_sentence_is_refused(preprocessor: Preprocessor) -> None:
    with pytest.raises(ModelUnavailable, match="not a batch of 64 tokens"):
        find_budget(preprocessor, device(30, 30)[1])


def test_batches_go_through_the_real_model(embedder: Embedder, preprocessor: Preprocessor) -> None:
    assert find_budget(preprocessor, lambda inputs: embedder.models._launch(inputs)()) == 4096


def test_batches_are_tried_next_to_what_every_model_keeps(
    random_checkpoint: Path, random_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    monkeypatch.setattr(EmbeddingModel, "find_budget", lambda _, kept_bytes: kept.append(kept_bytes) or 512)
    both = Settings(model=str(random_checkpoint), reranker=str(random_reranker), device="cpu", vision_cache_bytes=1000)
    models = Models(both)
    try:
        assert models._limit_batches_to_memory().max_batch_tokens == 512
        prefixes = [model.forward.language.max_prefix_bytes for model in models._loaded]
        assert kept == [1000 + sum(prefixes)] * 2
    finally:
        models.close()


@pytest.mark.gpu
def test_small_gpu_gets_small_batches_and_serves_them(random_checkpoint: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**28 / total)
    try:
        with Embedder(str(random_checkpoint), device="cuda") as one:
            budget = one.engine.settings.max_batch_tokens
            assert 64 <= budget < one.settings.max_batch_tokens
            vectors = one.embed([" word" * (budget // 8)] * 100)
        assert len(vectors) == 100
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
