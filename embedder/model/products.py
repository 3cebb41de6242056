"""The linear layers of a loaded model, arranged for the fastest matrix products of the device.

On every device, layers of the same input become one: query, key and value; gate and up. On a CPU, the weights may then
be stored in oneDNN's blocked layout. On some processors torch's default product (MKL) is slower than that, mostly for
few rows; on others it is the faster one (`python -m benchmarks.choices`). A short measurement at start decides.

The model is changed in place, one layer after the other, so that at most one layer is in memory twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedder.model.eight_bit import EightBitLinear, Int8Linear, Product
from embedder.model.int8_digits import DigitLinear, has_exact_products
from embedder.model.memory import release_freed_memory
from embedder.model.onednn import PackedLinear, onednn_product
from embedder.model.time_ratio import MAX_TIME_RATIO, time_ratio

logger = logging.getLogger(__name__)

ROWS = (16, 128)  # what is measured: a short query, and a batch
NUM_MEASURED = 3  # layers, so that their weights do not fit the smaller caches
MAX_MEASURED_WEIGHTS = 2**20  # of each: 128 rows take 2 ms on two cores
MAX_MEASURED_INT8 = 2**24
DIRECT_ROWS = (1, 2, 4, 8, 16, 32)
DIRECT_MULTIPLE = 16  # of in_features: torch's product with int8 reads this many values at a time, also past the end
MEASURE_S = 0.2


def arrange_products(model: Any, *, is_compiled: bool = False) -> str:
    """Join and pack the linear layers of a loaded model. Returns the product's name: torch or oneDNN.

    Compiled layers use torch's product, because oneDNN's would be compiled again for each number of rows.
    """
    join_layers(model.language_model.layers)
    if is_compiled:
        return "torch"
    chosen = fastest_product(model)
    if chosen == "oneDNN":
        pack_linears(model)
    if model.device.type == "cpu":
        arrange_int8(model)
    return chosen


def join_layers(layers: Sequence[Any]) -> None:
    """Replace the linear layers of one input by one: `qkv_proj` (`kv_proj` in the last layer) and `gate_up_proj`.

    The last layer needs queries only for the pooled tokens, so its `q_proj` stays. `qk_norm_weight`, (heads of query
    and key, head_dim), holds the weights of their norms.
    """
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        if hasattr(mlp, "gate_up_proj"):  # several engines share the model
            continue
        if layer is layers[-1]:
            attention.kv_proj = _join(attention, ("k_proj", "v_proj"))
        else:
            weights = [
                norm.weight.expand(projection.out_features // attention.head_dim, -1)
                for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj))
            ]
            # a buffer, whose shape torch.compile takes as fixed
            attention.register_buffer("qk_norm_weight", torch.cat(weights), persistent=False)
            attention.qkv_proj = _join(attention, ("q_proj", "k_proj", "v_proj"))
        mlp.gate_up_proj = _join(mlp, ("gate_proj", "up_proj"))


def _join(parent: nn.Module, names: Sequence[str]) -> nn.Module:
    """One linear layer with the outputs of the named ones, which are removed from their parent."""
    parts: list[Any] = [parent.get_submodule(name) for name in names]
    joined = parts[0].joined(parts) if isinstance(parts[0], EightBitLinear) else _joined(parts)
    for name in names:
        delattr(parent, name)
    return joined


def _joined(parts: Sequence[nn.Linear]) -> nn.Linear:
    joined = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=False, device="meta")
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return joined


def pack_linears(module: nn.Module) -> None:
    """Replace each linear layer inside `module` by a packed one."""
    for name in [name for name, _ in module.named_children()]:  # the names only: a list of layers would keep them all
        child = module.get_submodule(name)
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


def add_product(residual: Tensor, linear: nn.Module, states: Tensor) -> Tensor:
    """`residual` + linear(states). Overwrites `residual`: without a bias, the product adds it in the same kernel."""
    if torch.compiler.is_compiling():
        # The compiler fuses the sum with the operation that follows. In float32, which rounds a sum of 16 bits the same
        # way, it does not make a product with a matrix to add, which would be copied to the output first.
        product: Tensor = linear(states)
        return (residual.float() + product.float()).to(residual.dtype)
    if isinstance(linear, nn.Linear) and linear.bias is None:
        return residual.addmm_(states, linear.weight.t())
    residual += linear(states)
    return residual


def fastest_product(model: Any) -> str:
    """The name of the product that is faster with weights of this model, torch or oneDNN. Takes `MEASURE_S`."""
    found = [layer.mlp.gate_up_proj for layer in model.language_model.layers]
    linears = [_part(linear) for linear in found if isinstance(linear, nn.Linear)][:NUM_MEASURED]
    if not linears or not can_pack(linears[0].weight):
        return "torch"
    packed = [PackedLinear(linear) for linear in linears]
    ratios = [
        _time_ratio(packed, linears, torch.ones(num_rows, linears[0].in_features, dtype=linears[0].weight.dtype))
        for num_rows in ROWS
    ]
    chosen = "oneDNN" if math.prod(ratios) <= MAX_TIME_RATIO ** len(ratios) else "torch"
    logger.info(
        "matrix products: %s (oneDNN takes %s of torch's time for %s rows)",
        chosen,
        " and ".join(f"{ratio:.0%}" for ratio in ratios),
        " and ".join(map(str, ROWS)),
    )
    return chosen


def arrange_int8(model: nn.Module) -> None:
    """Choose the products of int8 layers on a CPU by measuring."""
    names = [name for name, one in model.named_modules() if isinstance(one, Int8Linear)]
    if not names:
        return
    layers: list[Any] = [model.get_submodule(name) for name in names]
    arrange_conversion(layers)
    if not digits_are_faster(layers):
        return
    del layers  # which would keep all weights
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.scratch = None
        model.set_submodule(name, DigitLinear(layer))
        release_freed_memory()  # of the weight as it was: else freed weights of all layers stay in the heap


def digits_are_faster(layers: Sequence[Int8Linear]) -> bool:
    """Whether integer products of digits are exact here, and take less time than the arranged products."""
    if not has_exact_products():
        return False
    parts = [_int8_part(layer, layer.product, layer.max_direct_rows) for layer in _largest(layers)]
    digits = [DigitLinear(part) for part in parts]
    ratios = [_time_ratio(digits, parts, _ones(parts[0], num_rows)) for num_rows in ROWS]
    is_faster = math.prod(ratios) <= MAX_TIME_RATIO ** len(ratios)
    logger.info(
        "int8 weights: %s (products of digits take %s of the time for %s rows)",
        "products of digits" if is_faster else "converted",
        " and ".join(f"{ratio:.0%}" for ratio in ratios),
        " and ".join(map(str, ROWS)),
    )
    return is_faster


def _largest(layers: Sequence[Int8Linear]) -> list[Int8Linear]:
    """Some of the largest weights, all of one shape."""
    shape = max((layer.weight.shape for layer in layers), key=math.prod)
    return [layer for layer in layers if layer.weight.shape == shape][:NUM_MEASURED]


def arrange_conversion(layers: Sequence[Int8Linear]) -> None:
    """Choose how the weights are converted for products with floats.

    Up to a number of rows, torch's product with int8 is faster than a conversion of the weight.
    """
    scratch = torch.empty(max(layer.weight.numel() for layer in layers), dtype=layers[0].dtype)
    for layer in layers:
        layer.scratch = scratch
    measured = _largest(layers)
    chosen = fastest_conversion(measured)
    product = onednn_product if chosen == "oneDNN" else F.linear
    max_direct_rows = most_direct_rows(measured, product)
    for layer in layers:
        layer.product = product
        layer.max_direct_rows = max_direct_rows if layer.in_features % DIRECT_MULTIPLE == 0 else 0
    logger.info("int8 weights: read directly for up to %d rows, else converted for %s", max_direct_rows, chosen)


def fastest_conversion(layers: Sequence[Int8Linear]) -> str:
    """The name of the product that is faster with converted weights, torch or oneDNN."""
    if layers[0].scratch is None or not can_pack(layers[0].scratch):
        return "torch"
    by_onednn, by_torch = ([_int8_part(layer, product) for layer in layers] for product in (onednn_product, F.linear))
    ratio = math.prod(_time_ratio(by_onednn, by_torch, _ones(layers[0], num_rows)) for num_rows in ROWS)
    return "oneDNN" if ratio <= MAX_TIME_RATIO ** len(ROWS) else "torch"


def most_direct_rows(layers: Sequence[Int8Linear], product: Product) -> int:
    """The largest of `DIRECT_ROWS` for which, and for all before it, int8 is read faster than it is converted; or 0."""
    if layers[0].in_features % DIRECT_MULTIPLE:
        return 0
    direct = [_int8_part(layer, product, max(DIRECT_ROWS)) for layer in layers]
    converted = [_int8_part(layer, product) for layer in layers]
    most = 0
    for num_rows in DIRECT_ROWS:
        if _time_ratio(direct, converted, _ones(layers[0], num_rows)) > 1:
            break
        most = num_rows
    return most


def _ones(layer: Int8Linear, num_rows: int) -> Tensor:
    return torch.ones(num_rows, layer.in_features, dtype=layer.dtype)


def _int8_part(layer: Int8Linear, product: Product, max_direct_rows: int = 0) -> Int8Linear:
    """The first outputs of a layer: so many that its weights come from memory, not from a cache."""
    num_outputs = max(1, min(layer.out_features, MAX_MEASURED_INT8 // layer.in_features))
    part = Int8Linear(layer.in_features, num_outputs, None, layer.dtype)
    part.weight = nn.Parameter(layer.weight[:num_outputs], requires_grad=False)
    part.scale = layer.scale[:num_outputs]
    part.scratch, part.product, part.max_direct_rows = layer.scratch, product, max_direct_rows
    return part


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a blocked layout for weights of this device and data type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _part(linear: nn.Linear) -> nn.Linear:
    """The first outputs of a layer, so that its product does not take long."""
    num_outputs = max(1, min(linear.out_features, MAX_MEASURED_WEIGHTS // linear.in_features))
    part = nn.Linear(linear.in_features, num_outputs, bias=False, device="meta")
    part.weight = nn.Parameter(linear.weight[:num_outputs], requires_grad=False)
    return part


@torch.inference_mode()
def _time_ratio(ours: Sequence[nn.Module], theirs: Sequence[nn.Module], states: Tensor) -> float:
    return time_ratio(
        lambda: [layer(states) for layer in ours], lambda: [layer(states) for layer in theirs], MEASURE_S / len(ROWS)
    )
