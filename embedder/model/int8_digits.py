"""Matrix products with int8 weights on a CPU, by its integer instructions (VNNI, AMX).

Each row of the states is rounded to integers of 16 bits (24 bits for float32), relative to its largest value. Their
digits of 8 bits are rows of one product of integers, whose sums are exact. So a row of the output does not depend on
the other rows, and the states lose less than in bfloat16. Weights are read once, as 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedder.model.eight_bit import Int8Linear
from embedder.model.onednn import padded_rows

ZERO = 128  # of a digit: oneDNN takes unsigned ones
MAX_ROWS = 256  # of the states, at a time: the sums of more would not fit the caches
_TINY = torch.finfo(torch.float32).tiny


class DigitLinear(nn.Module):
    """An int8 layer, whose weight is stored in oneDNN's layout."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.weight: Tensor = torch.ops.onednn.qlinear_prepack(layer.weight.detach(), None)
        self.scale = layer.scale.float()
        self.zero_points = torch.zeros(layer.out_features, dtype=torch.int32)
        self.bias = layer.bias
        self.num_digits = num_digits(layer.dtype)

    def forward(self, states: Tensor) -> Tensor:
        """(num_rows, in_features) to (num_rows, out_features)."""
        parts = [self._product(part) for part in torch.split(states, MAX_ROWS)]
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output if self.bias is None else output.add_(self.bias)

    def _product(self, states: Tensor) -> Tensor:
        digits, scale = split_digits(states, self.num_digits, padded_rows(len(states)))
        sums = integer_product(digits.flatten(0, 1), self)
        output: Tensor
        output, *others = sums.view(*digits.shape[:2], -1)[:, : len(states)]
        for digit in others:
            output = torch.add(digit, output, alpha=256)
        return output.mul_(scale).to(states.dtype)


def integer_product(digits: Tensor, layer: DigitLinear) -> Tensor:
    """Rows of digits times the weights, by their scale: (num_rows, out_features) float32."""
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(
        digits,
        1.0,  # scale of the digits
        ZERO,
        layer.weight,
        layer.scale,
        layer.zero_points,
        None,  # bias
        1.0,  # scale of the output
        0,  # and its zero point
        torch.float32,
        "none",  # operation on the output, with its arguments
        [],
        "",
    )
    return sums


def num_digits(dtype: torch.dtype) -> int:
    """Digits of 8 bits for states of `dtype`."""
    return 3 if dtype == torch.float32 else 2


def split_digits(states: Tensor, num_digits: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """The states as integers, highest digits first, (num_digits, num_rows, in_features), and the scale of each row.

    A digit is stored with `ZERO` added to it. Rows are added up to `num_rows`.
    """
    ones = (256**num_digits - 1) // 255  # each digit is 1
    exact = states.float()
    largest = 127 * ones - 2  # two less than digits can be: the quotient is rounded
    scale = exact.abs().amax(1, keepdim=True).div_(largest).clamp_min_(_TINY)
    integers = (exact / scale).round_().to(torch.int32).add_(ZERO * ones)
    digits = torch.empty(num_digits, num_rows, states.shape[1], dtype=torch.uint8)
    digits[:, len(states) :] = ZERO
    for place, digit in enumerate(digits):
        digit[: len(states)] = integers >> 8 * (num_digits - 1 - place)  # the conversion keeps the lowest 8 bits
    return digits, scale


def has_exact_products() -> bool:
    """Whether oneDNN adds up these products without saturation. Without VNNI, sums of two products saturate."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():  # type: ignore[no-untyped-call]
        return False
    layer = Int8Linear(256, 64, None, torch.float32)
    layer.weight = nn.Parameter(torch.full((64, 256), 127, dtype=torch.int8), requires_grad=False)
    layer.scale = torch.ones(64)
    outputs = DigitLinear(layer)(torch.ones(16, 256))
    return bool(torch.allclose(outputs, torch.tensor(127.0 * 256), rtol=1e-6))
