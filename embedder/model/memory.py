"""Compares the memory that a checkpoint's weights need with the free memory, before anything is loaded."""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from embedder.errors import ModelUnavailable
from embedder.model.compact_table import compact_bytes, stores_compactly
from embedder.model.eight_bit import eight_bit_bytes, eight_bit_names
from embedder.model.weight_files import Shape
from embedder.settings import WeightFormat

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2
EMBEDDINGS = "language_model.embed_tokens.weight"
KEPT_BYTES = 2**27
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MAX_MMAP_THRESHOLD = 2**25


def check_memory(
    shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, weight_format: WeightFormat | None = None
) -> int:
    """Bytes of the weights that are loaded in `dtype`, or in 8 bits where `weight_format` applies.

    `shapes`: as `check_weights` returns them. Raises `ModelUnavailable` if the bytes exceed the device's free memory.
    """
    needed = weights_bytes(shapes, dtype, device, weight_format)
    free = free_bytes(device)
    if free is not None and needed > free:
        smaller = "set EMBEDDER_DTYPE=bfloat16, " if dtype.itemsize > 2 else ""
        smaller += "" if weight_format else "set EMBEDDER_WEIGHTS=int8, "
        formats = str(dtype).removeprefix("torch.") + (f" and {weight_format}" if weight_format else "")
        raise ModelUnavailable(
            f"the weights take {needed / 2**30:.1f} GiB as {formats}; {device} has "
            f"{free / 2**30:.1f} GiB free. Serve a smaller checkpoint, {smaller}or use a device with more memory"
        )
    return needed


def weights_bytes(
    shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, weight_format: WeightFormat | None = None
) -> int:
    """Bytes of the weights of these shapes, as `check_memory` counts them."""
    names = eight_bit_names(shapes) if weight_format else set()
    is_compact = stores_compactly(weight_format, dtype, device)

    def num_bytes(name: str, shape: Shape) -> int:
        if weight_format and name in names:
            return eight_bit_bytes(shape, weight_format, dtype)
        if is_compact and name == EMBEDDINGS:
            return compact_bytes(*shape)
        return math.prod(shape) * dtype.itemsize

    return sum(num_bytes(name, shape) for name, shape in shapes.items())


def release_freed_memory() -> None:
    """Give memory that was freed inside of glibc's heap back to the system. Elsewhere it does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what a batch frees, up to `KEPT_BYTES`, for the next batch.

    Otherwise it returns most of it to the system, and each page that is taken again costs 1 us. A text of 2,048 tokens
    took 120,000 (the small shape of the benchmarks). Does nothing with another C library, or if the environment has
    settings of its own.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        set_option(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
        set_option(_M_TRIM_THRESHOLD, KEPT_BYTES)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; else available memory of the machine and free swap, within what the container has left.

    None if the operating system does not report it.
    """
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    if not _MEMINFO.is_file():
        return None
    kib = {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", _MEMINFO.read_text(encoding="ascii"))}
    free = (kib["MemAvailable"] + kib["SwapFree"]) * 1024
    return min(free, _free_bytes_of_container(default=free))


def _free_bytes_of_container(default: int) -> int:
    """Bytes that are left of the container's limit; `default` if it has none.

    Cached files count as free, because the kernel drops them when memory is needed. Both lists of them count, as in
    MemAvailable: a file that was downloaded and then read, such as a checkpoint, is on the active one.
    """
    path = _CGROUP / "memory.max"
    limit = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
    if limit == "max":
        return default
    used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    cached = int(counts["inactive_file"]) + int(counts["active_file"])
    return max(0, int(limit) - used + cached)
