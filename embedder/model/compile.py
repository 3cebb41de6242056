"""A function of a layer and tensors -> the same, or what torch.compile makes of it: fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]
Fuse = Callable[[Function], Function]


def uncompiled(function: Function) -> Function:
    """Operation by operation."""
    return function


def compiled(function: Function) -> Function:
    """One graph for all layers and all numbers of tokens from 2 on, made at the first call.

    Products stay those of the library; norms, rotations, activations and sums between them become kernels of their own.
    """
    return torch.compile(function, dynamic=True, fullgraph=True)
