"""How the layers run: one kernel at a time (eager), through torch.compile, replayed as CUDA graphs, or both."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedder.errors import ModelUnavailable
from embedder.model.onednn import padded_rows

Function = Callable[..., Any]

CPU_ROWS = 256  # the fastest of 128 to 2,048 with the widths of the 2B and of a third of them (2 cores, AMD EPYC)


@dataclass(frozen=True)
class Execution:
    """A value of `EMBEDDER_EXECUTION` for a device, and why it was chosen. `is_required`: chosen by the user."""

    is_compiled: bool
    has_graphs: bool
    is_required: bool
    reason: str

    def __str__(self) -> str:
        names = ["graphs"] * self.has_graphs + ["compiled"] * self.is_compiled or ["eager"]
        return f"{'+'.join(names)} ({self.reason})"


def choose_execution(setting: str, device: torch.device, attention: str) -> Execution:
    """The setting's value resolved for the device and the attention back end.

    Graphs need attention that takes the lengths of the sequences from the device: not sdpa, whose calls depend on
    them. Raises `ModelUnavailable` for graphs that are not possible.
    """
    can_graph = device.type == "cuda" and attention != "sdpa"
    if setting != "auto":
        if "graphs" in setting and not can_graph:
            raise ModelUnavailable(
                f"EMBEDDER_EXECUTION={setting} needs a GPU with varlen or flash_attn; the device is {device}, the "
                f"attention back end {attention}"
            )
        return Execution("compiled" in setting, "graphs" in setting, True, f"EMBEDDER_EXECUTION={setting}")
    if not can_graph:
        return Execution(False, False, False, _why_eager(device))
    if missing := missing_for_triton():
        return Execution(False, True, False, f"not compiled: {missing}")
    return Execution(True, True, False, "the default on a GPU with a C compiler and Triton")


def _why_eager(device: torch.device) -> str:
    return "the default on a CPU" if device.type == "cpu" else f"the default on {device} with sdpa"


def missing_for_triton() -> str:
    """What torch.compile lacks on this machine to make kernels for a GPU; empty if nothing.

    Triton compiles a module of Python with the C compiler, at the first launch of a kernel.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not find_compiler():
        return "there is no C compiler"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")  # where Triton looks for it
    return "" if header.is_file() else f"{header} is missing; it is in a package such as python3-dev"


def find_compiler() -> str:
    """The C compiler that Triton would use; empty if there is none."""
    names = (os.environ.get("CC", ""), "gcc", "clang", "cc")  # in the order of Triton
    return next((path for name in names if name and (path := shutil.which(name))), "")


def compile_if(is_compiled: bool, function: Function) -> Function:
    """The function through torch.compile, or the function itself (eager mode).

    The compiled function is one graph for all layers and all numbers of tokens from 2 on, made at its first call.
    Inductor fuses norms, rotations, activations and residual sums; matrix products stay those of the library.
    """
    return torch.compile(function, dynamic=True, fullgraph=True) if is_compiled else function


def by_rows(compute: Function, output: Tensor, *states: Tensor) -> Tensor:
    """`compute(*states)`, which treats each row by itself. May write to `output`, which has the shape of the result.

    On a CPU `CPU_ROWS` at a time: the values between two products then stay in the caches, and glibc, which returns
    freed blocks of more than 32 MB to the system, keeps their memory.
    """
    if torch.compiler.is_compiling() or output.device.type != "cpu" or len(output) <= CPU_ROWS:
        computed: Tensor = compute(*states)
        return computed
    num_rows = len(output)
    length = padded_rows(math.ceil(num_rows / math.ceil(num_rows / CPU_ROWS)))  # parts of about equal length
    for start in range(0, num_rows, length):
        rows = slice(start, start + length)
        part, computed = output[rows], compute(*[one[rows] for one in states])
        if computed.data_ptr() != part.data_ptr():  # not computed in place
            part.copy_(computed)
    return output
