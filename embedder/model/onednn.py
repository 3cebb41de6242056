"""oneDNN's matrix product for any number of rows, and a linear layer that uses it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN prepares each number of rows once: up to 1 ms for each shape of a weight, and about 0.6 MB of heap (2 cores,
# AMD EPYC). Products are therefore computed for multiples of `step` rows, up to `end` rows each: with the bundled
# model, the process had grown by 229 MB after 100 random numbers of rows up to 1,024, and by 355 MB after 400. A short
# text has up to 64 rows, and is not padded.
_STEPS = ((64, 1), (256, 16), (512, 32), (2048, 64))
_LAST_STEP = 256


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """(num_rows, in_features) to (num_rows, out_features)."""
        return onednn_product(states, self.weight, self.bias)


def activated_product(linear: nn.Module, activation: nn.Module, states: Tensor) -> Tensor:
    """activation(linear(states)). oneDNN computes a GELU in the product's kernel."""
    if isinstance(linear, PackedLinear) and isinstance(activation, nn.GELU):
        return onednn_product(states, linear.weight, linear.bias, "gelu", activation.approximate)
    output: Tensor = activation(linear(states))
    return output


def onednn_product(
    states: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = ""
) -> Tensor:
    """Compute `F.linear`, and an activation by oneDNN's names. `weight` is in oneDNN's layout or a plain one."""
    output = onednn_matmul(pad_rows(states), weight, bias, activation, algorithm)
    return output[: len(states)] if len(output) > len(states) else output


def onednn_matmul(
    states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", algorithm: str = ""
) -> Tensor:
    """`onednn_product` for exactly these shapes.

    A plain `weight` may be transposed, but its rows or columns have to be adjacent: else this is 100 times slower.
    """
    output: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, activation, [], algorithm)
    return output


def pad_rows(states: Tensor) -> Tensor:
    """`states`, (num_rows, size), and after them the rows of zeros that oneDNN's product needs."""
    missing = padded_rows(len(states)) - len(states)
    return F.pad(states, (0, 0, 0, missing)) if missing else states


def padded_rows(num_rows: int) -> int:
    """The number of rows for which oneDNN computes a product of `num_rows`."""
    step = next((step for end, step in _STEPS if num_rows <= end), _LAST_STEP)
    return math.ceil(num_rows / step) * step
