"""Linear layers whose weights have 8 bits and one scale for each output: `EMBEDDER_WEIGHTS`.

`int8` runs on every device: the states keep their type, and only the weights are rounded. `fp8` (e4m3) runs on GPUs of
the Ada and Hopper generations and later, whose products take both factors in fp8. The vision tower, the first layers of
the language tower (`KEPT_SHARE`), its embeddings and its norms stay in the data type of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedder.errors import ModelUnavailable
from embedder.model.modules import Towers
from embedder.model.weight_files import Shape
from embedder.settings import WeightFormat

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of states, weight and bias

FP8_CAPABILITY = (8, 9)  # Ada: the first architecture with products of fp8
VALUES_AT_ONCE = 2**18  # of a weight, quantized through float32. Larger blocks would leave holes in the heap

# The first layers keep their weights, because what they lose grows through all layers after them, and the later ones
# lose little: `python -m benchmarks.weights --parts sensitivities` records the figures. The vision tower keeps all of
# its weights: pictures would lose as much as by the last 24 of 28 layers. It has no small batches, which int8 makes
# faster. The token embeddings would lose more than that.
KEPT_SHARE = 1 / 6

# Layers of the language tower, by the name of their weight. Norms have the same names and one dimension.
_LAYERS = re.compile(r"language_model\.layers\.(\d+)\..+\.weight")


def check_weight_format(weight_format: WeightFormat | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ModelUnavailable` if the device has no products of fp8, or not with states of `dtype`."""
    if weight_format != "fp8":
        return
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        found = f"{device} has {capability[0]}.{capability[1]}"
    else:
        capability, found = (0, 0), f"the device is {device}"
    if capability < FP8_CAPABILITY:
        raise ModelUnavailable(
            "EMBEDDER_WEIGHTS=fp8 needs an NVIDIA GPU of the Ada or Hopper generation or newer (capability 8.9); "
            f"{found}. Set EMBEDDER_WEIGHTS=int8, which runs on every device"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ModelUnavailable(f"EMBEDDER_WEIGHTS=fp8 needs EMBEDDER_DTYPE=bfloat16 or auto; got {name}")


def eight_bit_names(shapes: Mapping[str, Shape]) -> set[str]:
    """The weights of a trunk that get 8 bits: those of the language tower's layers except the first ones."""
    numbers = {name: int(match[1]) for name in shapes if (match := _LAYERS.fullmatch(name)) and len(shapes[name]) == 2}
    num_kept = int((1 + max(numbers.values(), default=0)) * KEPT_SHARE)
    return {name for name, number in numbers.items() if number >= num_kept}


def eight_bit_bytes(shape: Shape, weight_format: WeightFormat, dtype: torch.dtype) -> int:
    """The bytes of a weight in 8 bits and its scales."""
    return math.prod(shape) + shape[0] * (4 if weight_format == "fp8" else dtype.itemsize)


def use_eight_bit_layers(model: Towers, weight_format: WeightFormat, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model on the meta device, before weights are read. `dtype`: the states'."""
    kind = Fp8Linear if weight_format == "fp8" else Int8Linear
    for name in eight_bit_names({name: tuple(one.shape) for name, one in model.named_parameters()}):
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        replaced = kind(layer.in_features, layer.out_features, layer.bias, dtype)
        model.set_submodule(name.removesuffix(".weight"), replaced)


class EightBitLinear(nn.Module):
    """A linear layer with an 8-bit weight, (out_features, in_features), and `scale`, (out_features,).

    `dtype`: data type of the states. Without weights until `quantize` is called.
    """

    value_dtype: ClassVar[torch.dtype]
    max_value: ClassVar[float]

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.bias = bias
        empty = torch.empty(out_features, in_features, dtype=self.value_dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("scale", torch.empty(out_features, dtype=self.scale_dtype, device="meta"))
        self.scale: Tensor

    @property
    def scale_dtype(self) -> torch.dtype:
        """The type that the product takes."""
        raise NotImplementedError

    def quantize(self, weight: Tensor) -> None:
        """Take the nearest 8-bit values of `weight`, on its device. A row's scale maps its largest value to the last.

        The scale is rounded to its type first, so that the values are those of the scale that is used.
        """
        values = torch.empty(weight.shape, dtype=self.value_dtype, device=weight.device)
        scale = torch.empty(len(weight), dtype=self.scale_dtype, device=weight.device)
        num_rows = max(1, VALUES_AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), num_rows):
            rows = slice(start, start + num_rows)
            exact, of_values, of_scale = weight[rows].float(), values[rows], scale[rows]
            of_scale.copy_(exact.abs().amax(1) / self.max_value)
            of_scale[of_scale == 0] = 1  # a row of zeros
            scaled = exact / of_scale.float()[:, None]
            of_values.copy_(self._round(scaled).clamp_(-self.max_value, self.max_value))
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = scale

    def _round(self, values: Tensor) -> Tensor:
        """The conversion rounds, except to integers."""
        return values

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One layer with the outputs of all parts, which have the same inputs."""
        bias = None
        if parts[0].bias is not None:
            bias = nn.Parameter(torch.cat([part.bias for part in parts if part.bias is not None]), requires_grad=False)
        layer = cls(parts[0].in_features, sum(part.out_features for part in parts), bias, parts[0].dtype)
        layer.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        layer.scale = torch.cat([part.scale for part in parts])
        return layer


class Int8Linear(EightBitLinear):
    """Weights in int8; the states keep their type.

    A CPU with instructions for integers uses `DigitLinear` instead, if that is faster. On other CPUs, torch's product
    that reads int8 is used for up to `max_direct_rows` rows. For more rows, the weight is converted to the type of the
    states in `scratch`, which all layers of a model share, and then multiplied by `product`. On a GPU, the converted
    weight is allocated for each product, because torch's product with int8 is slow there: it computes one output after
    the other in float32.
    """

    value_dtype = torch.int8
    max_value = 127.0

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.max_direct_rows = 0
        self.scratch: Tensor | None = None
        self.product: Product = F.linear

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.dtype

    def _round(self, values: Tensor) -> Tensor:
        return values.round_()

    def forward(self, states: Tensor) -> Tensor:
        """(num_rows, in_features) to (num_rows, out_features)."""
        if len(states) <= self.max_direct_rows:
            output = torch._weight_int8pack_mm(states.contiguous(), self.weight, self.scale)
            return output if self.bias is None else output.add_(self.bias)
        if self.scratch is None:
            return F.linear(states, self.weight * self.scale[:, None], self.bias)
        # Scaled before the product, not after it: outputs in bfloat16 would be rounded twice.
        converted = self.scratch[: self.weight.numel()].view(self.weight.shape).copy_(self.weight)
        return self.product(states, converted.mul_(self.scale[:, None]), self.bias)


class Fp8Linear(EightBitLinear):
    """Both factors in fp8: each row of the states is scaled to its largest value before the product."""

    value_dtype = torch.float8_e4m3fn
    max_value = 448.0

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, states: Tensor) -> Tensor:
        """(num_rows, in_features) to (num_rows, out_features)."""
        largest = torch.linalg.vector_norm(states, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
        scale = (largest / self.max_value).clamp_min_(torch.finfo(torch.float32).tiny)
        output: Tensor = torch._scaled_mm(
            (states / scale).to(self.value_dtype),
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale[None],
            bias=self.bias,
            out_dtype=self.dtype,
        )
        return output
