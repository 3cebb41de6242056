"""The estimate of the largest items' times, and what the log says about them."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from embedder.inputs.items import EmbeddingItem, Text
from embedder.loaded_model import EmbeddingModel
from embedder.model import speed
from embedder.model.checkpoint import find_checkpoint
from embedder.settings import Settings, available_cores


@pytest.fixture(scope="module")
def deep_checkpoint(write_random: Callable[..., Path]) -> Path:
    """One with enough layers to measure."""
    return write_random({"num_hidden_layers": 6}, {"depth": 5, "deepstack_visual_indexes": [1, 2]})


def load(folder: Path, **settings: object) -> EmbeddingModel:
    chosen = Settings(model=str(folder), device="cpu", **settings)
    return EmbeddingModel(find_checkpoint(chosen), chosen, torch.device("cpu"))


def advance(monkeypatch: pytest.MonkeyPatch, elapsed_s: float, cpu_s: float) -> None:
    """Make both clocks advance by so many seconds from layer to layer. `cpu_s`: of each thread."""
    for clock, step_s in (("perf_counter", elapsed_s), ("process_time", cpu_s * torch.get_num_threads())):
        monkeypatch.setattr(speed.time, clock, map(step_s.__mul__, range(1000)).__next__)


def measure(model: EmbeddingModel) -> tuple[speed.Speed, int]:
    """The measured speed, and the number of tokens of the text that was measured."""
    measured = speed.measure_speed(model.forward, model.preprocessor)
    assert measured is not None
    return measured, model.preprocessor(EmbeddingItem((Text(" a" * speed.MEASURED_WORDS),))).num_tokens


def test_estimate_scales_the_measured_layers_to_all_of_them(
    deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(deep_checkpoint)
    advance(monkeypatch, elapsed_s=1.0, cpu_s=1e9)
    measured, num_tokens = measure(model)
    num_patches = (speed.MEASURED_SIDE // 16) ** 2
    assert measured.seconds(0, num_tokens) == pytest.approx(6), "one second for each layer"
    assert measured.seconds(num_patches, 0) == pytest.approx(5)
    double = measured.seconds(0, 2 * num_tokens)
    assert 12 < double < 24, "attention grows with the square"


def test_time_in_which_other_programs_use_the_cores_does_not_count(
    deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(deep_checkpoint)
    advance(monkeypatch, elapsed_s=3.0, cpu_s=1.0)
    measured, num_tokens = measure(model)
    assert measured.seconds(0, num_tokens) == pytest.approx(6), "one second for each layer"


BUSY = "print(flush=True)\nwhile True:\n    pass"


@contextmanager
def busy_cores() -> Iterator[None]:
    """Four other programs on each core, for as long as the block runs."""
    command = [sys.executable, "-c", BUSY]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4 * available_cores())]
    try:
        for program in programs:
            assert program.stdout is not None
            program.stdout.readline()
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()
            program.stdout.close()


@pytest.mark.slow
def test_estimate_on_busy_cores_is_that_on_idle_ones(write_random: Callable[..., Path]) -> None:
    """Its layers take longer than a turn of the kernel's scheduler: with waiting, the estimate is 5 times as long."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    folder = write_random(wide, {"out_hidden_size": 1024, "depth": 5, "deepstack_visual_indexes": [1, 2]})
    model = load(folder)

    def shortest_s() -> float:
        found = [speed.measure_speed(model.forward, model.preprocessor) for _ in range(3)]
        return min(one.seconds(0, 1000) for one in found if one)

    before = shortest_s()
    with busy_cores():
        busy = shortest_s()
    assert busy < 2 * max(before, shortest_s())


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
    advance(monkeypatch, seconds_per_layer, seconds_per_layer)
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
    slow = speed.Speed(
        model.forward,
        *(speed.Flops(one.products / 1e6, one.attention / 1e6) for one in (measured.vision, measured.language)),
    )
    monkeypatch.setattr(speed, "measure_speed", lambda *_: slow)
    with caplog.at_level(logging.WARNING):
        speed.warn_if_slow(model.forward, model.preprocessor)
    settings = dict(word.strip(",").split("=") for word in caplog.messages[0].split() if word.startswith("EMBEDDER_"))
    vision = model.preprocessor.vision
    patches = vision.regime.max_pixels // 256
    assert float(settings["EMBEDDER_REQUEST_TIMEOUT_S"]) > slow.seconds(patches, patches // 4)
    pixels = int(settings["EMBEDDER_MAX_PIXELS"])
    assert pixels == 4096 or slow.seconds(pixels // 256, math.ceil(pixels / 1024)) < 5
