"""Torch's errors to this project's: tells a device without free memory from one that no longer works."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from embedder.errors import DeviceFailed, DeviceOutOfMemory

# The CUDA runtime, cuBLAS and torch's CPU allocator raise a plain RuntimeError with these words.
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Translate an error of the device into `DeviceOutOfMemory` or `DeviceFailed`; others pass unchanged.

    After `DeviceOutOfMemory` the memory of the failed batch is free again.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's errors are RuntimeErrors
        traceback.clear_frames(error.__traceback__)  # the frames hold the tensors of the batch
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if _is_out_of_memory(error):
            if device.type != "cpu":
                torch.get_device_module(device).empty_cache()
            raise DeviceOutOfMemory(reason) from error
        if not _is_usable(device):
            raise DeviceFailed(reason) from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    has_type = isinstance(error, (torch.OutOfMemoryError, MemoryError))  # torch's caching allocator, and numpy
    return has_type or any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


def _is_usable(device: torch.device) -> bool:
    """False after a sticky CUDA error, such as a device-side assert or an illegal access: every later call fails too.

    An error that concerns one launch only does not stay, and the worker can go on.
    """
    if device.type == "cpu":
        return True
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError:
        return False
    return True
