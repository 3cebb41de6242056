"""Which device a worker uses, and in which data type: CUDA (and ROCm, which torch calls cuda), Intel's XPU, Apple's MPS
or the CPU.

Only NVIDIA's GPUs have kernels for packed sequences, graphs and compiled layers. Other accelerators and GPUs before
Ampere use `sdpa`, with one call for each length in a batch; this has not been measured.
"""

from __future__ import annotations

from pathlib import Path

import torch

from embedder.errors import ModelUnavailable
from embedder.model import gpus
from embedder.settings import Settings

ALLOWED = "auto, cpu, cuda, cuda:N, xpu, xpu:N, mps"
VARLEN_CAPABILITY = (8, 0)  # Ampere: the first architecture on which flash attention computes, and bfloat16 is fast
MACOS_WITH_BFLOAT16 = 14


def choose_device(settings: Settings, worker: int = 0) -> torch.device:
    """The device of worker number `worker`, counted from 0.

    `auto` assigns GPUs round-robin; without one, it is the accelerator that torch was built for, or else the CPU. A GPU
    always has an index. Raises `ModelUnavailable` if the machine does not have the device.
    """
    if settings.device == "auto":
        kind = next((kind for kind in ("cuda", "xpu", "mps") if count_devices(kind)), "cpu")
        return torch.device(kind, worker % count_devices(kind)) if kind in ("cuda", "xpu") else torch.device(kind)
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ModelUnavailable(f"EMBEDDER_DEVICE={settings.device!r}: allowed are {ALLOWED}") from error
    if device.type not in ("cpu", "cuda", "xpu", "mps"):
        raise ModelUnavailable(f"EMBEDDER_DEVICE={settings.device!r}: allowed are {ALLOWED}")
    found = count_devices(device.type)
    if (device.index or 0) >= found:
        names = {"cuda": "GPUs", "xpu": "XPUs", "mps": "GPUs of Apple"}
        raise ModelUnavailable(
            f"EMBEDDER_DEVICE={settings.device!r}, but torch {torch.__version__} finds {found} "
            f"{names.get(device.type, 'of them')} on this machine"
        )
    # some of torch's functions refuse a device without an index
    return torch.device(device.type, device.index or 0) if device.type in ("cuda", "xpu") else device


def check_device(device: torch.device) -> None:
    """Raise `ModelUnavailable` if torch cannot compute on a device that it has found.

    GPUs are counted by the driver's management library. A driver that is too old for torch's CUDA, a GPU without
    kernels in this build of torch, and one that another process uses alone show only when something runs.
    """
    if device.type == "cpu":
        return
    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelUnavailable(
            f"torch {torch.__version__} finds {device}, but cannot compute on it: {reason}"
        ) from error


def unused_driver(settings: Settings, device: torch.device) -> str:
    """The file of a GPU's driver, if the CPU was chosen only because torch finds no GPU; else empty."""
    if settings.device != "auto" or device.type != "cpu":
        return ""
    return next((driver for driver in gpus.GPU_DRIVERS if Path(driver).exists()), "")


def count_devices(kind: str) -> int:
    """How many devices of a kind (cpu, cuda, xpu, mps) torch can use."""
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "xpu":
        return torch.xpu.device_count()
    return int(kind == "cpu" or torch.backends.mps.is_available())


def choose_dtype(settings: Settings, device: torch.device, *, is_bundled: bool) -> torch.dtype:
    """The data type of the weights.

    `auto` is bfloat16 where the device multiplies it fast, else float16 on accelerators and float32 on a CPU. The
    bundled model stays in float32 on a CPU: it is small, and its recorded vectors are those of float32.
    """
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bfloat16() and not is_bundled else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= VARLEN_CAPABILITY else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(MACOS_WITH_BFLOAT16, 0) else torch.float16
    return torch.bfloat16


def has_varlen_kernels(device: torch.device) -> bool:
    """Whether flash attention over packed sequences runs on this device.

    Not on AMD's GPUs: torch's operator for ROCm takes no `num_splits`, and aligns sequences of different lengths at
    their beginnings.
    """
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= VARLEN_CAPABILITY


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16 (AVX512-BF16 or AMX).

    Without them, torch converts every value.
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
