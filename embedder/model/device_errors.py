"""What torch raises -> our errors, so that the engine can tell a full device from a lost one without knowing torch."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from embedder.errors import DeviceFailed, DeviceOutOfMemory

# what the CUDA runtime, cuBLAS and torch's CPU allocator say, in errors that have no type of their own
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Raises `DeviceOutOfMemory`, with the memory freed again, or `DeviceFailed`; any other error passes unchanged."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's errors are RuntimeErrors
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the batch
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if _is_out_of_memory(error):
            if device.type == "cuda":
                torch.cuda.empty_cache()
            raise DeviceOutOfMemory(reason) from error
        if not _answers(device):
            raise DeviceFailed(reason) from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    has_type = isinstance(error, (torch.OutOfMemoryError, MemoryError))  # torch's caching allocator, and numpy
    return has_type or any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


def _answers(device: torch.device) -> bool:
    """False after an error that stays: a device-side assert or an illegal access fails every later call as well.

    An error of one launch alone does not stay, and must not cost the worker.
    """
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
