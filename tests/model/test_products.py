"""The arranged linear layers against those of transformers, and the choice of the product."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embedder import Embedder
from embedder.model import onednn, products, sdpa
from embedder.model.onednn import PackedLinear, activated_product, padded_rows
from embedder.model.products import (
    arrange_products,
    can_pack,
    fastest_product,
    join_layers,
    pack_linears,
)
from embedder.model.weights import load_model
from tests.conftest import picture, words

CPU = torch.device("cpu")
MAX_DIFFERENCE = 1e-6  # of vectors computed with one product and with the other
needs_onednn = pytest.mark.skipif(not can_pack(torch.empty(0)), reason="torch is built without oneDNN")


def load(folder: Path) -> Any:
    return load_model(folder, torch.float32, CPU)


def linears(module: nn.Module) -> list[nn.Linear]:
    return [child for child in module.modules() if isinstance(child, nn.Linear)]


# Joined layers


def test_joined_layer_has_the_outputs_of_its_parts_in_order(random_checkpoint: Path) -> None:
    model, joined = load(random_checkpoint), load(random_checkpoint)
    join_layers(joined.language_model.layers)
    states = torch.randn(5, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    *pairs, last = zip(model.language_model.layers, joined.language_model.layers, strict=True)
    for before, after in (*pairs, last):
        attention, mlp = before.self_attn, before.mlp
        assert_joined(after.mlp.gate_up_proj, (mlp.gate_proj, mlp.up_proj), states)
        if (before, after) == last:
            assert_joined(after.self_attn.kv_proj, (attention.k_proj, attention.v_proj), states)
            assert torch.equal(after.self_attn.q_proj.weight, attention.q_proj.weight)
        else:
            assert_joined(after.self_attn.qkv_proj, (attention.q_proj, attention.k_proj, attention.v_proj), states)


def assert_joined(joined: nn.Linear, parts: tuple[nn.Linear, ...], states: Tensor) -> None:
    # Outputs up to 3: MKL on an Intel processor rounds sums of a larger matrix differently.
    assert torch.allclose(joined(states), torch.cat([part(states) for part in parts], 1), rtol=0, atol=1e-5)


def test_joined_layer_keeps_the_biases_of_its_parts() -> None:
    parent = nn.ModuleDict({"first": nn.Linear(4, 3), "second": nn.Linear(4, 2)}).requires_grad_(False)
    states, (first, second) = torch.randn(5, 4), parent.values()
    assert_joined(products._join(parent, ("first", "second")), (first, second), states)
    assert len(parent) == 0


@pytest.mark.parametrize("arrange", [lambda model: join_layers(model.language_model.layers), pack_linears])
def test_weights_are_in_memory_twice_for_at_most_one_layer(
    arrange: Callable[[Any], None], random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(random_checkpoint)
    replaced = [weakref.ref(linear) for linear in linears(model)]
    alive: list[int] = []

    def count_alive(make: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            alive.append(sum(reference() is not None for reference in replaced))
            return make(*args)

        return counting

    monkeypatch.setattr(products, "_join", count_alive(products._join))
    monkeypatch.setattr(products, "PackedLinear", count_alive(PackedLinear))
    arrange(model)
    assert len(alive) > 5
    assert all(after < before for before, after in pairwise(alive))


# Packed layers


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
def test_packed_layer_gives_the_same_for_every_number_of_rows(has_bias: bool) -> None:
    linear = nn.Linear(48, 80, bias=has_bias).requires_grad_(False)
    packed = PackedLinear(linear)
    for num_rows in (*range(1, 70), 200, 257, 700):
        states = torch.randn(num_rows, 48)
        assert packed(states).shape == (num_rows, 80)
        assert torch.allclose(packed(states), linear(states), rtol=0, atol=2e-6)


@needs_onednn
@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()])
def test_activation_of_a_packed_layer_is_that_of_the_layer(activation: nn.Module) -> None:
    linear = nn.Linear(48, 80).requires_grad_(False)
    states = 10 * torch.randn(21, 48)
    expected = activation(linear(states))
    for one in (linear, PackedLinear(linear)):
        assert torch.allclose(activated_product(one, activation, states), expected, rtol=1e-6, atol=5e-6)


def test_number_of_row_counts_is_bounded_and_little_is_computed_in_vain() -> None:
    padded = [padded_rows(num_rows) for num_rows in range(1, 16385)]
    assert len(set(padded)) <= 165
    assert all(rows <= more <= rows + max(3, rows / 4) for rows, more in enumerate(padded, start=1))
    assert padded[:64] == list(range(1, 65))  # a short text


@needs_onednn
def test_packed_model_has_no_other_copy_of_its_weights(random_checkpoint: Path) -> None:
    model = load(random_checkpoint)
    join_layers(model.language_model.layers)
    num_weights = sum(linear.weight.numel() for linear in linears(model))
    weights = [weakref.ref(linear.weight) for linear in linears(model)]
    pack_linears(model)
    assert not linears(model)
    assert not any(weight() is not None for weight in weights)
    assert sum(one.weight.numel() for one in model.modules() if isinstance(one, PackedLinear)) == num_weights


ITEMS = ["red", words(40), {"image": picture(90, 200, 1)}, words(9, 3), {"image": picture(128, 96, 9), "text": "which"}]


@needs_onednn
def test_vectors_do_not_depend_on_the_product(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {}
    for name in ("torch", "oneDNN"):
        monkeypatch.setattr(products, "fastest_product", lambda _, name=name: name)
        with Embedder(str(random_checkpoint), device="cpu", dtype="float32") as embedder:
            assert bool(linears(embedder.forward.language.tower)) == (name == "torch")
            vectors[name] = np.stack(embedder.embed(ITEMS))
            alone = np.concatenate([embedder.embed([item]) for item in ITEMS])
        assert np.abs(alone - vectors[name]).max() <= MAX_DIFFERENCE
    assert np.abs(vectors["torch"] - vectors["oneDNN"]).max() <= MAX_DIFFERENCE


@needs_onednn
def test_rows_without_a_token_are_added_once_and_their_values_are_not_read(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention does not write them. Here, the memory for its result is filled with NaN before."""
    monkeypatch.setattr(products, "fastest_product", lambda _: "oneDNN")
    with Embedder(str(random_checkpoint), device="cpu", dtype="float32", attention="sdpa") as embedder:
        expected = embedder.embed(ITEMS)
        padded = []
        original = onednn.F.pad
        monkeypatch.setattr(
            onednn.F, "pad", lambda states, *rest: padded.append(states.shape) or original(states, *rest)
        )
        monkeypatch.setattr(sdpa.torch, "empty", lambda *size, **options: torch.full(*size, torch.nan, **options))
        alone = [embedder.embed([item])[0] for item in ITEMS if isinstance(item, str)]
    assert np.abs(np.stack(alone) - np.stack([expected[0], expected[1], expected[3]])).max() <= MAX_DIFFERENCE
    assert len(padded) <= 3 * len(alone)  # hidden states, cos and sin of each text, and nothing in any layer


# The choice


@pytest.fixture(scope="module")
def joined(random_checkpoint: Path) -> Any:
    model = load(random_checkpoint)
    join_layers(model.language_model.layers)
    return model


@needs_onednn
@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [((0.5, 0.9), "oneDNN"), ((0.5, 1.2), "oneDNN"), ((0.9, 1.3), "torch"), ((1.0, 0.99), "torch")],
)
def test_faster_product_is_chosen_and_logged(
    ratios: tuple[float, float],
    chosen: str,
    joined: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = dict(zip(products.ROWS, ratios, strict=True))
    monkeypatch.setattr(products, "_time_ratio", lambda ours, theirs, states: times[len(states)])
    with caplog.at_level(logging.INFO, products.__name__):
        assert fastest_product(joined) == chosen
    assert f"matrix products: {chosen} (oneDNN takes {ratios[0]:.0%} and" in caplog.text


def test_measurement_tells_a_slower_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the work, not by the machine: one side computes a hundred times as much."""
    monkeypatch.setattr(products, "MEASURE_S", 0.0)  # the smallest number of rounds
    small, large = nn.Linear(64, 64), nn.Linear(64, 64)
    work = nn.Sequential(*[large] * 100)
    assert products._time_ratio([small], [work], torch.ones(16, 64)) < 1
    assert products._time_ratio([work], [small], torch.ones(16, 64)) > 1


def test_compiled_layers_keep_the_product_of_torch(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "fastest_product", lambda _: "oneDNN")
    model = load(random_checkpoint)
    assert arrange_products(model, is_compiled=True) == "torch"
    assert len(linears(model)) > 5


def test_weights_that_onednn_cannot_pack_keep_the_product_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_pack(torch.empty(0, device="meta"))
    assert not can_pack(torch.empty(0, dtype=torch.float16))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(torch.empty(0))
