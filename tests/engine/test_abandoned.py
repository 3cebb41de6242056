"""A batch whose callers are all gone stops between two layers, if the launch computes (as on a CPU)."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest

from embedder.engine.engine import Engine
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image
from embedder.models import Models
from embedder.settings import Settings
from tests.fake_model import FakeModel, busy_device, item, running, unit, wait_until


class Layers:
    """Called with the size of each batch once the gate is open, as the layers of a model would call the engine."""

    def __init__(self, model: FakeModel) -> None:
        self.finished: list[int] = []
        self.engine: Engine | None = None
        model.on_batch = self

    def __call__(self, num_items: int) -> None:
        assert self.engine is not None
        self.engine.stop_if_abandoned()
        self.finished.append(num_items)


class Activations:
    """What a forward pass holds."""


def test_batch_without_callers_stops_and_the_next_one_runs(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    layers = Layers(model)
    with caplog.at_level(logging.DEBUG), running(model) as layers.engine:
        model.gate.clear()
        gone = layers.engine.submit(item("gone"))
        assert model.is_entered.wait(10)
        assert gone.cancel()
        model.gate.set()
        np.testing.assert_allclose(layers.engine.submit(item("here")).result(10).vector, unit("here"), atol=1e-7)
        assert layers.finished == [1]
        assert layers.engine.pending_tokens == 0
    assert not caplog.records, "it is no fault"


def test_memory_of_an_abandoned_batch_is_freed_at_once(model: FakeModel) -> None:
    references: list[weakref.ref[Activations]] = []

    def compute(_: int) -> None:
        activations = Activations()
        references.append(weakref.ref(activations))
        engine.stop_if_abandoned()

    gc.disable()
    try:
        with running(model) as engine:
            model.gate.clear()
            gone = engine.submit(item("gone"))
            assert model.is_entered.wait(10)
            assert gone.cancel()
            model.on_batch = compute
            model.gate.set()
            engine.submit(item("here")).result(10)
            assert references[0]() is None
    finally:
        gc.enable()


def test_batch_goes_on_for_one_caller(model: FakeModel) -> None:
    layers = Layers(model)
    with running(model) as layers.engine:
        with busy_device(layers.engine, model):
            futures = [layers.engine.submit(item(text)) for text in ("gone", "here", "gone too")]
            wait_until(lambda: len(layers.engine._inputs) == 3)

            def leave(num_items: int) -> None:
                if num_items == 3:
                    assert futures[0].cancel()
                    assert futures[2].cancel()
                layers(num_items)

            model.on_batch = leave
        np.testing.assert_allclose(futures[1].result(10).vector, unit("here"), atol=1e-7)
        assert layers.finished == [1, 3], "the holder, then all three"


def test_equal_item_that_arrives_in_time_keeps_the_batch(model: FakeModel) -> None:
    layers = Layers(model)
    with running(model, cache_bytes=10_000) as layers.engine:
        model.gate.clear()
        gone = layers.engine.submit(item("red"))
        assert model.is_entered.wait(10)
        late = layers.engine.submit(item("red"))
        assert gone.cancel()
        model.gate.set()
        np.testing.assert_allclose(late.result(10).vector, unit("red"), atol=1e-7)
        assert model.batches == [1]


def test_equal_item_that_arrives_late_is_computed_again(model: FakeModel) -> None:
    with running(model, cache_bytes=10_000) as engine:
        late = []

        def stop(_: int) -> None:
            try:
                engine.stop_if_abandoned()
            except Exception:
                late.append(engine.submit(item("red")))  # after the check, before the engine knows of it
                raise

        model.on_batch = stop
        model.gate.clear()
        gone = engine.submit(item("red"))
        assert model.is_entered.wait(10)
        assert gone.cancel()
        model.gate.set()
        wait_until(lambda: bool(late))
        np.testing.assert_allclose(late[0].result(10).vector, unit("red"), atol=1e-7)
        assert model.batches == [1, 1]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_real_forward_pass_stops_before_its_next_layer(random_checkpoint: Path, stop_after: int) -> None:
    models = Models(Settings(model=str(random_checkpoint), device="cpu"))
    try:
        (model,) = models._loaded
        num_layers = len(model.forward.vision.tower.blocks) + len(model.forward.language.tower.layers) - 1
        calls: list[int] = []

        def count() -> None:
            calls.append(len(calls))
            models.engine.stop_if_abandoned()

        model.forward.call_between_layers(count)
        picture = EmbeddingItem((Image(EXAMPLE_IMAGE),))
        models.engine.submit(picture).result(30)
        assert len(calls) >= num_layers, "each layer asks; those of a new instruction in addition"
        calls.clear()

        def leave() -> None:
            count()
            if len(calls) == stop_after:
                gone.cancel()

        model.forward.call_between_layers(leave)
        gone = models.engine.submit(EmbeddingItem((Image(EXAMPLE_IMAGE),)), wake=False)
        models.engine.wake()
        wait_until(lambda: not models.engine._pending and len(calls) > stop_after)
        model.forward.call_between_layers(count)
        models.engine.submit(picture).result(30)
        assert len(calls) == stop_after + 1 + num_layers
    finally:
        models.close()
