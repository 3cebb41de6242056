"""Which device a worker uses, and in which data type."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from embedder.errors import ModelUnavailable
from embedder.model import devices, gpus
from embedder.model.devices import check_device, choose_device, choose_dtype, unused_driver
from embedder.settings import Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:x"])
def test_device_that_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        choose_device(Settings(device=device))
    assert str(caught.value) == f"EMBEDDER_DEVICE={device!r}: allowed are auto, cpu, cuda, cuda:N, xpu, xpu:N, mps"


@pytest.mark.parametrize(("device", "name"), [("cuda:99", "GPUs"), ("xpu:99", "XPUs")])
def test_device_that_is_not_there_is_refused(device: str, name: str) -> None:
    with pytest.raises(ModelUnavailable, match=rf"'{device}', but torch \S+ finds \d+ {name} on this machine$"):
        choose_device(Settings(device=device))


def test_device_is_the_one_named_or_the_one_there_is() -> None:
    assert choose_device(Settings(device="cpu")) == CPU
    expected = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    assert choose_device(Settings(device="auto"), worker=0) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"cuda": 2, "xpu": 1}, ["cuda:0", "cuda:1", "cuda:0"]),
        ({"xpu": 2}, ["xpu:0", "xpu:1", "xpu:0"]),
        ({"mps": 1}, ["mps", "mps", "mps"]),
        ({}, ["cpu", "cpu", "cpu"]),
    ],
)
def test_auto_takes_the_accelerator_that_is_there(
    found: dict[str, int], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count_devices", lambda kind: found.get(kind, 0))
    assert [str(choose_device(Settings(), worker)) for worker in range(3)] == expected


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("xpu", "xpu:0"), ("mps", "mps"), ("cpu", "cpu")],
)
def test_gpu_that_is_named_has_an_index(device: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, `torch.cuda.set_per_process_memory_fraction`, for example, refuses it."""
    monkeypatch.setattr(devices, "count_devices", lambda _: 2)
    assert str(choose_device(Settings(device=device))) == expected


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of torch without CUDA")
def test_device_on_which_torch_cannot_compute_is_refused_in_one_line() -> None:
    check_device(CPU)
    with pytest.raises(ModelUnavailable) as caught:
        check_device(torch.device("cuda", 0))
    assert str(caught.value) == (
        f"torch {torch.__version__} finds cuda:0, but cannot compute on it: Torch not compiled with CUDA enabled"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The NVIDIA driver on your system is too old (found version 12020)."),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nSearch for it"),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization with error: unknown\n\nCUDA call"),
    ],
)
def test_reason_for_which_torch_cannot_compute_is_shown(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(ModelUnavailable) as caught:
        check_device(torch.device("cuda", 1))
    assert str(caught.value).endswith(f"finds cuda:1, but cannot compute on it: {str(error).splitlines()[0]}")


def test_driver_of_a_gpu_that_torch_does_not_find_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "GPU_DRIVERS", (str(tmp_path / "none"), str(tmp_path)))
    assert unused_driver(Settings(), CPU) == str(tmp_path)
    assert unused_driver(Settings(device="cpu"), CPU) == ""
    assert unused_driver(Settings(), torch.device("cuda", 0)) == ""
    monkeypatch.setattr(gpus, "GPU_DRIVERS", ())
    assert unused_driver(Settings(), CPU) == ""


@pytest.mark.parametrize(
    ("device", "capability", "macos", "expected"),
    [
        ("cuda", (9, 0), 0, torch.bfloat16),
        ("cuda", (8, 0), 0, torch.bfloat16),
        ("cuda", (7, 5), 0, torch.float16),
        ("xpu", (), 0, torch.bfloat16),
        ("mps", (), 14, torch.bfloat16),
        ("mps", (), 13, torch.float16),
    ],
)
@pytest.mark.parametrize("hip", [None, "6.4"])
def test_accelerator_takes_16_bits(
    hip: str | None,
    device: str,
    capability: tuple[int, ...],
    macos: int,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, _: macos >= major)
    assert choose_dtype(Settings(), torch.device(device), is_bundled=True) == expected


NATIVE = ({"avx512_bf16": True}, {"amx_bf16": True, "avx512_bf16": False})
OTHER = ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, {"neon": True})


@pytest.mark.parametrize(
    ("dtype", "device", "is_bundled", "processors", "expected"),
    [
        ("auto", "cpu", False, NATIVE, torch.bfloat16),
        ("auto", "cpu", False, OTHER, torch.float32),
        ("auto", "cpu", True, NATIVE, torch.float32),
        ("float32", "cpu", False, NATIVE, torch.float32),
        ("bfloat16", "cpu", True, OTHER, torch.bfloat16),
        ("float16", "mps", False, OTHER, torch.float16),
    ],
)
def test_dtype_is_the_one_named_or_what_the_processor_multiplies_fastest(
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    device: str,
    is_bundled: bool,
    processors: tuple[dict[str, bool], ...],
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for processor in processors:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda processor=processor: processor)
        chosen = choose_dtype(Settings(dtype=dtype), torch.device(device), is_bundled=is_bundled)
        assert chosen == expected
