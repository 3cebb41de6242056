"""Torch's errors: which mean a full device, which a lost one, and that nothing of the batch stays in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from embedder.errors import DeviceFailed, DeviceOutOfMemory
from embedder.model.device_errors import device_errors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a CUDA device that answers."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: calls.append("synchronize"))
    return calls


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_memory_that_the_cpu_does_not_have_is_out_of_memory(allocate: Callable[[int], object]) -> None:
    with pytest.raises(DeviceOutOfMemory, match=r"Unable to allocate|can't allocate memory"), device_errors(CPU):
        allocate(10**15)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_full_gpu_is_out_of_memory_and_its_cache_is_emptied(error: Exception, calls: list[str]) -> None:
    with pytest.raises(DeviceOutOfMemory), device_errors(CUDA):
        raise error
    assert calls == ["empty_cache"]


def test_error_that_stays_is_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assertion = torch.AcceleratorError("CUDA error: device-side assert triggered\nsearch for it")

    def synchronize(_: torch.device) -> None:
        raise assertion

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    with pytest.raises(DeviceFailed) as caught, device_errors(CUDA):
        raise assertion
    assert caught.value.message == "AcceleratorError: CUDA error: device-side assert triggered"


def test_error_of_one_launch_passes_unchanged(calls: list[str]) -> None:
    with pytest.raises(torch.AcceleratorError, match="invalid configuration"), device_errors(CUDA):
        raise torch.AcceleratorError("CUDA error: invalid configuration argument")
    assert calls == ["synchronize"]
    with pytest.raises(RuntimeError, match="shapes"), device_errors(CPU):
        raise RuntimeError("shapes do not fit")


def test_batch_that_did_not_fit_is_not_held_by_its_error() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def forward() -> None:
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    with pytest.raises(DeviceOutOfMemory) as caught, device_errors(CPU):
        forward()
    assert caught.value.__cause__ is not None
    assert alive[0]() is None
