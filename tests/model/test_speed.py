"""The estimate of the largest items' times, and what the log says about them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embedder.inputs.items import EmbeddingItem, Text
from embedder.loaded_model import EmbeddingModel
from embedder.model import speed
from embedder.model.checkpoint import find_checkpoint
from embedder.settings import Settings


@pytest.fixture(scope="module")
def deep_checkpoint(write_random: Callable[..., Path]) -> Path:
    """One with enough layers to measure."""
    return write_random({"num_hidden_layers": 6}, {"depth": 5, "deepstack_visual_indexes": [1, 2]})


def load(folder: Path, **settings: object) -> EmbeddingModel:
    chosen = Settings(model=str(folder), device="cpu", **settings)
    return EmbeddingModel(find_checkpoint(chosen), chosen, torch.device("cpu"))


def test_estimate_scales_the_measured_layers_to_all_of_them(
    deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances a second from layer to layer."""
    model = load(deep_checkpoint)
    clock = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    measured = speed.measure_speed(model.forward, model.preprocessor)
    assert measured is not None
    num_patches = (speed.MEASURED_SIDE // 16) ** 2
    num_tokens = model.preprocessor(EmbeddingItem((Text(" a" * speed.MEASURED_WORDS),))).num_tokens
    assert measured.seconds(0, num_tokens) == pytest.approx(6), "one second for each layer"
    assert measured.seconds(num_patches, 0) == pytest.approx(5)
    double = measured.seconds(0, 2 * num_tokens)
    assert 12 < double < 24, "attention grows with the square"


def test_measuring_leaves_the_model_as_it_was(deep_checkpoint: Path) -> None:
    model = load(deep_checkpoint)
    item = [model.preprocessor(EmbeddingItem((Text("red"),)))]
    before = model.launch(item)()
    speed.measure_speed(model.forward, model.preprocessor)
    assert (model.launch(item)() == before).all()


@pytest.mark.parametrize("limits", [{"max_input_tokens": 64}, {"max_image_pixels": 100_000}], ids=str)
def test_limits_that_allow_only_small_items_need_no_estimate(limits: dict[str, int], deep_checkpoint: Path) -> None:
    model = load(deep_checkpoint, **limits)
    assert speed.measure_speed(model.forward, model.preprocessor) is None


def test_towers_that_are_too_small_to_measure_have_no_estimate(
    random_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(random_checkpoint)
    with caplog.at_level(logging.INFO):
        speed.warn_if_slow(model.forward, model.preprocessor)
    assert speed.measure_speed(model.forward, model.preprocessor) is None
    assert "estimated" not in caplog.text


@pytest.mark.parametrize(
    ("seconds_per_layer", "warned"), [(1e-6, []), (3600.0, ["EMBEDDER_MAX_PIXELS=", "EMBEDDER_MAX_INPUT_TOKENS="])]
)
def test_warning_names_the_settings_if_an_item_takes_longer_than_the_time_out(
    deep_checkpoint: Path,
    seconds_per_layer: float,
    warned: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load(deep_checkpoint)
    clock = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: seconds_per_layer * next(clock))
    with caplog.at_level(logging.INFO):
        speed.warn_if_slow(model.forward, model.preprocessor)
    assert caplog.text.count("estimated for this CPU") == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [name in warning for name, warning in zip(warned, warnings, strict=True)] == [True] * len(warned)
    assert all("EMBEDDER_REQUEST_TIMEOUT_S=" in warning for warning in warnings)


def test_proposed_time_out_is_longer_than_the_estimate_and_proposed_pixels_fit_the_time_out(
    deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(deep_checkpoint, request_timeout_s=5.0)
    measured = speed.measure_speed(model.forward, model.preprocessor)
    assert measured is not None
    slow = speed.Speed(model.forward, measured.vision / 1e6, measured.language / 1e6)
    monkeypatch.setattr(speed, "measure_speed", lambda *_: slow)
    with caplog.at_level(logging.WARNING):
        speed.warn_if_slow(model.forward, model.preprocessor)
    settings = dict(word.strip(",").split("=") for word in caplog.messages[0].split() if word.startswith("EMBEDDER_"))
    vision = model.preprocessor.vision
    patches = vision.regime.max_pixels // 256
    assert float(settings["EMBEDDER_REQUEST_TIMEOUT_S"]) > slow.seconds(patches, patches // 4)
    pixels = int(settings["EMBEDDER_MAX_PIXELS"])
    assert pixels == 4096 or slow.seconds(pixels // 256, math.ceil(pixels / 1024)) < 5
