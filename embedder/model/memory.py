"""Compares the memory that a checkpoint's weights need with the free memory, before anything is loaded."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from embedder.errors import ModelUnavailable
from embedder.model.weight_files import read_shapes

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(folder: Path, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the weights in `dtype`. Raises `ModelUnavailable` if that is more than the device's free memory."""
    needed = weights_bytes(folder, dtype)
    free = free_bytes(device)
    if free is not None and needed > free:
        smaller = "set EMBEDDER_DTYPE=bfloat16, " if dtype.itemsize > 2 else ""
        raise ModelUnavailable(
            f"the weights take {needed / 2**30:.1f} GiB as {str(dtype).removeprefix('torch.')}; {device} has "
            f"{free / 2**30:.1f} GiB free. Serve a smaller checkpoint, {smaller}or use a device with more memory"
        )
    return needed


def weights_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of all weights of the files that are read, in `dtype`. Reads only their headers."""
    return sum(map(math.prod, read_shapes(folder).values())) * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; else available memory of the machine and free swap, within the container's limit.

    None if the operating system does not report it.
    """
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    if not _MEMINFO.is_file():
        return None
    kib = {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", _MEMINFO.read_text(encoding="ascii"))}
    free = (kib["MemAvailable"] + kib["SwapFree"]) * 1024
    limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip() if _CGROUP_LIMIT.is_file() else "max"
    return free if limit == "max" else min(free, int(limit))
