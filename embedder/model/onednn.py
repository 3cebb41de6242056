"""oneDNN's matrix product for any number of rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN prepares each number of rows once: up to 1 ms for each shape of a weight, and about 0.6 MB of heap (2 cores,
# AMD EPYC). Products are therefore computed for multiples of `step` rows, up to `end` rows each: with the
# bundled model, the process had grown by 255 MB after 100 random numbers of rows up to 1,024, and by 266 MB after 200.
_STEPS = ((4, 1), (64, 4), (256, 16), (512, 32), (2048, 64))
_LAST_STEP = 256


def onednn_product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear`. `weight` is in oneDNN's layout or a plain one."""
    num_rows = len(states)
    if missing := padded_rows(num_rows) - num_rows:
        states = F.pad(states, (0, 0, 0, missing))
    output: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return output[:num_rows] if missing else output


def padded_rows(num_rows: int) -> int:
    """The number of rows for which oneDNN computes a product of `num_rows`."""
    step = next((step for end, step in _STEPS if num_rows <= end), _LAST_STEP)
    return math.ceil(num_rows / step) * step
