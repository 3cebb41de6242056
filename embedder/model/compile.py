"""torch.compile for the functions of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def compile_if(is_compiled: bool, function: Function) -> Function:
    """The function through torch.compile, or the function itself (eager mode).

    The compiled function is one graph for all layers and all numbers of tokens from 2 on, made at its first call.
    Inductor fuses norms, rotations, activations and residual sums; matrix products stay those of the library.
    """
    return torch.compile(function, dynamic=True, fullgraph=True) if is_compiled else function
