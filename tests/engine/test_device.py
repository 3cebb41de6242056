"""Batches on the device: rows, measurements, and errors in the order of the batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import embedder.engine.device
from embedder.engine.device import INITIAL_SECONDS_PER_TOKEN, Device, WaitForRows
from embedder.engine.job import Job
from embedder.inputs.preprocess import ModelInput
from tests.fake_model import HIDDEN_SIZE, FakeModel, item, row


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the device reads."""
    clock = SimpleNamespace(now_s=100.0)
    clock.monotonic = lambda: clock.now_s
    monkeypatch.setattr(embedder.engine.device, "time", clock)
    return clock


def is_wanted(_: Job) -> bool:
    return True


def jobs(model: FakeModel, *texts: str) -> list[Job]:
    jobs = [Job(item(text), None, 0) for text in texts]
    for job in jobs:
        job.model_input = model.preprocess(job.item)
    return jobs


def test_rows_and_measurements_of_a_batch(model: FakeModel, clock: SimpleNamespace) -> None:
    device = Device(model.launch_ahead, is_wanted)
    assert device.seconds_per_token == INITIAL_SECONDS_PER_TOKEN
    in_flight = device.launch(jobs(model, "red", "green"))
    clock.now_s += 4
    rows, batch = device.wait(in_flight)
    np.testing.assert_array_equal(rows, [row("red"), row("green")])
    assert (batch.num_items, batch.num_tokens, batch.started_s, batch.ended_s) == (2, 8, 100, 104)
    assert device.seconds_per_token == 0.5


def test_batch_launched_ahead_starts_when_the_one_before_ends(model: FakeModel, clock: SimpleNamespace) -> None:
    device = Device(model.launch_ahead, is_wanted)
    first, second = device.launch(jobs(model, "red")), device.launch(jobs(model, "green"))
    clock.now_s = 103
    device.wait(first)
    clock.now_s = 105
    _, batch = device.wait(second)
    assert (batch.started_s, batch.ended_s) == (103, 105)


def test_error_of_a_launch_is_raised_when_its_batch_is_waited_for(model: FakeModel) -> None:
    def launch(inputs: list[ModelInput]) -> WaitForRows:
        if len(inputs) == 2:
            raise RuntimeError("not launched")
        return model.launch_ahead(inputs)

    device = Device(launch, is_wanted)
    before, bad = device.launch(jobs(model, "red")), device.launch(jobs(model, "green", "blue"))
    device.wait(before)
    with pytest.raises(RuntimeError, match="not launched"):
        device.wait(bad)


def test_wrong_number_of_rows_is_an_error(model: FakeModel) -> None:
    device = Device(lambda _: lambda: np.zeros((1, HIDDEN_SIZE), np.float32), is_wanted)
    with pytest.raises(AssertionError):
        device.wait(device.launch(jobs(model, "red", "green")))
