"""Integer products of int8 weights: their values, and when they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from embedder import Embedder
from embedder.model import int8_digits, products
from embedder.model.eight_bit import Int8Linear
from embedder.model.int8_digits import MAX_ROWS, DigitLinear, has_exact_products, num_digits, split_digits
from tests.model.test_eight_bit import ITEMS, exact_values, make_layer, randn

needs_integer_products = pytest.mark.skipif(not has_exact_products(), reason="this CPU has no VNNI")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def value_of(digits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    places = [256.0**place for place in reversed(range(len(digits)))]
    return sum(place * (digit.double() - 128) for place, digit in zip(places, digits, strict=True)) * scale.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_are_the_states_rounded_to_16_or_24_bits(dtype: torch.dtype) -> None:
    states = (randn(200, 64) * torch.logspace(-4, 4, 200)[:, None]).to(dtype)
    states[5] = 0
    digits, scale = split_digits(states, num_digits(dtype), 208)
    assert digits.shape == (3 if dtype == torch.float32 else 2, 208, 64)
    largest = states.double().abs().amax(1, keepdim=True)
    step = 2.0**-15 if dtype != torch.float32 else 2.0**-22
    assert bool(((value_of(digits[:, :200], scale) - states.double()).abs() <= step * largest).all())
    assert bool((digits[:, 200:] == 128).all())


@pytest.mark.parametrize("value", [1.0, -1.0, 3.14159e30, -1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_value_of_a_row_does_not_overflow(dtype: torch.dtype, value: float) -> None:
    """In float32 the quotient by the scale may be rounded to more than the digits can be."""
    states = torch.full((500, 4), value, dtype=dtype) * (1 + torch.arange(500, dtype=torch.float32)[:, None] / 500)
    digits, scale = split_digits(states.to(dtype), num_digits(dtype), 500)
    assert torch.allclose(value_of(digits, scale), states.to(dtype).double(), rtol=1e-4)


@needs_integer_products
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8 + 2**-12)])
def test_product_is_that_of_the_rounded_weights_for_every_number_of_rows(
    dtype: torch.dtype, rounding: float, has_bias: bool
) -> None:
    layer = make_layer(Int8Linear, randn(80, 48), dtype, randn(80).to(dtype) if has_bias else None)
    digits = DigitLinear(layer)
    for num_rows in (1, 2, 9, 64, MAX_ROWS, MAX_ROWS + 1, 3 * MAX_ROWS):
        states = randn(num_rows, 48, seed=num_rows).to(dtype)
        expected = F.linear(states.float(), exact_values(layer), layer.bias.float() if has_bias else None)
        output = digits(states)
        assert output.dtype == dtype
        largest = expected.abs().amax(1, keepdim=True)
        assert bool(((output.float() - expected).abs() <= 2 * rounding * largest).all())


@needs_integer_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_of_a_batch_equals_the_row_by_itself_bit_for_bit(dtype: torch.dtype) -> None:
    layer = DigitLinear(make_layer(Int8Linear, randn(96, 64), dtype))
    states = randn(MAX_ROWS + 20, 64, seed=1).to(dtype)
    rows = layer(states)
    assert all(torch.equal(layer(states[row : row + 1]), rows[row : row + 1]) for row in range(0, len(states), 7))


@needs_integer_products
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    layer = make_layer(Int8Linear, randn(16, 32), torch.bfloat16)
    states = randn(3, 32).bfloat16()
    states[1, 4] = value
    output = DigitLinear(layer)(states)
    assert output[[0, 2]].isfinite().all()
    assert not output[1].isfinite().any()
    weight = randn(16, 32)
    weight[7, 3] = value
    assert not DigitLinear(make_layer(Int8Linear, weight, torch.bfloat16))(states)[:, 7].isfinite().any()


def test_processor_whose_sums_saturate_does_not_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors without VNNI, where 16 bits hold the sum of two products."""

    def saturate(digits: torch.Tensor, layer: DigitLinear) -> torch.Tensor:
        pairs = (digits.float() * 127).view(len(digits), -1, 2).sum(-1).clamp(-32768, 32767)
        sums = pairs.sum(-1, keepdim=True) - 128 * 127 * digits.shape[1]  # digits have 128 added to them
        return sums.expand(-1, 64)

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(int8_digits, "integer_product", saturate)
    assert not has_exact_products()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not has_exact_products()


@needs_integer_products
@pytest.mark.parametrize("is_faster", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_of_both_products_agree(
    dtype: Any, is_faster: bool, random_checkpoint: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "digits_are_faster", lambda _: is_faster)
    expected = np.stack(embedder.embed(ITEMS))
    with Embedder(str(random_checkpoint), device="cpu", dtype=dtype, weights="int8") as eight:
        vectors = np.stack(eight.embed(ITEMS))
        kinds = {type(one) for one in eight.forward.language.tower.modules()} & {DigitLinear, Int8Linear}
    assert kinds == {DigitLinear if is_faster else Int8Linear}
    assert float((vectors * expected).sum(1).min()) >= 0.999


def test_weights_are_kept_once(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the int8 weight as it was loaded nor the memory of the conversion stays."""
    if not has_exact_products():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(products, "digits_are_faster", lambda _: True)
    with Embedder(str(random_checkpoint), device="cpu", weights="int8") as eight:
        layers = [one for one in eight.forward.language.tower.modules() if isinstance(one, DigitLinear)]
        assert layers
        for layer in layers:
            kept = {name for name, one in vars(layer).items() if isinstance(one, (torch.Tensor, nn.Module))}
            assert kept == {"weight", "scale", "zero_points"}
