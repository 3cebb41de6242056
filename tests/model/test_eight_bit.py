"""Weights of 8 bits: what is rounded, how far the vectors move, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fake_cuda import CUDA, emulated_scaled_mm, fake_cuda, missing_requirement
from embedder import Embedder, Reranker
from embedder.errors import ModelUnavailable
from embedder.inputs.items import EmbeddingItem, Image, Text
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model import cuda_graphs, eight_bit, weights
from embedder.model.cuda_graphs import TextGraphs, graph_size
from embedder.model.eight_bit import EightBitLinear, Fp8Linear, Int8Linear, check_weight_format
from embedder.model.memory import EMBEDDINGS, check_memory, weights_bytes
from embedder.model.packing import pack
from embedder.model.pooling import pool
from embedder.model.products import arrange_products
from embedder.model.weights import check_weights, load_model
from embedder.settings import Settings, WeightFormat
from tests.conftest import picture, words

CPU = torch.device("cpu")
FORMATS: tuple[WeightFormat, ...] = ("int8", "fp8")
MIN_COSINE = {"int8": 0.999, "fp8": 0.95}
ITEMS = ["red", words(40), {"image": picture(90, 200, 1)}, words(9, 3), {"image": picture(128, 96, 9), "text": "which"}]

needs_fake_cuda = pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")


def make_layer(kind: type[EightBitLinear], weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Any:
    parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer = kind(weight.shape[1], weight.shape[0], parameter, dtype)
    layer.quantize(weight)
    return layer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_values(layer: EightBitLinear) -> Tensor:
    return layer.weight.float() * layer.scale.float()[:, None]


# Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_values_are_the_nearest_and_rows_have_scales_of_their_own(dtype: torch.dtype) -> None:
    weight = randn(40, 64) * torch.logspace(-3, 1, 40)[:, None]
    weight[7] = 0
    layer = make_layer(Int8Linear, weight, dtype)
    assert layer.scale.dtype == dtype
    assert int(layer.weight.max()) == 127
    error = (exact_values(layer) - weight).abs() / layer.scale.float()[:, None]
    assert float(error.max()) <= 0.76  # half a step; the largest value may be cut by the rounding of the scale
    assert float(error.flatten().quantile(0.99)) <= 0.5
    assert not exact_values(layer)[7].any()


def test_fp8_values_are_within_the_rounding_of_three_bits() -> None:
    weight = randn(40, 64) * torch.logspace(-3, 1, 40)[:, None]
    layer = make_layer(Fp8Linear, weight, torch.bfloat16)
    assert torch.allclose(exact_values(layer), weight, rtol=2**-4, atol=float(weight.abs().max()) * 2**-16)
    assert torch.equal(layer.weight.float().abs().amax(1), torch.full((40,), 448.0))


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_rows_are_quantized_in_parts_with_the_same_result(
    kind: type[EightBitLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = randn(50, 32)
    whole = make_layer(kind, weight, torch.bfloat16)
    monkeypatch.setattr(eight_bit, "VALUES_AT_ONCE", 7 * 32)
    in_parts = make_layer(kind, weight, torch.bfloat16)
    assert torch.equal(exact_values(whole), exact_values(in_parts))


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_joined_layer_has_the_values_of_its_parts(kind: type[EightBitLinear]) -> None:
    parts = [make_layer(kind, randn(rows, 32, seed=rows), torch.bfloat16, randn(rows)) for rows in (16, 48)]
    joined = kind.joined(parts)
    assert torch.equal(exact_values(joined), torch.cat([exact_values(part) for part in parts]))
    assert torch.equal(joined.bias, torch.cat([part.bias for part in parts]))
    assert (joined.in_features, joined.out_features) == (32, 64)


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_weight_that_is_not_finite_is_not_hidden(kind: type[EightBitLinear]) -> None:
    for value in (torch.nan, torch.inf):
        weight = randn(16, 32)
        weight[3, 5] = value
        assert not exact_values(make_layer(kind, weight, torch.bfloat16))[3].isfinite().any()


# Products


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_int8_product_is_that_of_the_rounded_weights_for_every_number_of_rows(
    dtype: torch.dtype, rounding: float, has_bias: bool
) -> None:
    layer = make_layer(Int8Linear, randn(80, 48), dtype, randn(80).to(dtype) if has_bias else None)
    layer.max_direct_rows = 8
    for num_rows in (1, 2, 8, 9, 64, 257):
        states = randn(num_rows, 48, seed=num_rows).to(dtype)
        expected = F.linear(states.float(), exact_values(layer), layer.bias.float() if has_bias else None)
        output = layer(states)
        assert output.dtype == dtype
        assert torch.allclose(output.float(), expected, rtol=rounding, atol=rounding * float(expected.abs().max()))


@pytest.mark.parametrize("has_bias", [True, False])
def test_fp8_product_is_that_of_rounded_states_and_weights(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", emulated_scaled_mm)
    layer = make_layer(Fp8Linear, randn(80, 48), torch.bfloat16, randn(80).bfloat16() if has_bias else None)
    states = randn(5, 48, seed=1).bfloat16() * torch.logspace(-2, 2, 5, dtype=torch.bfloat16)[:, None]
    states[2] = 0
    output = layer(states)
    bias = layer.bias.float() if has_bias else torch.zeros(80)
    expected = states.float() @ exact_values(layer).t() + bias
    largest = (expected - bias).abs().amax(1, keepdim=True)
    assert float(((output.float() - expected).abs() - 0.05 * largest - 2**-8 * expected.abs()).max()) <= 0
    assert torch.equal(output[2].float(), bias)


def test_arguments_of_the_scaled_product_are_those_of_this_torch() -> None:
    """As in torch 2.13. Those of torch 2.11 were not looked up."""
    names = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]
    assert names == ["self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum"]


# Loading


@pytest.mark.parametrize("weight_format", FORMATS)
def test_linear_layers_get_8_bits_and_everything_else_stays(
    weight_format: WeightFormat, random_checkpoint: Path
) -> None:
    plain = load_model(random_checkpoint, torch.float32, CPU)  # the type of its files
    model = load_model(random_checkpoint, torch.bfloat16, CPU, weight_format)
    names = {name for name, one in model.named_modules() if isinstance(one, EightBitLinear)}
    assert names == {
        name
        for name, one in plain.named_modules()
        if isinstance(one, nn.Linear) and name.startswith("language_model.layers.")
    }
    found, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    if weight_format == "int8":
        table = expected[EMBEDDINGS]
        found[EMBEDDINGS] = model.language_model.embed_tokens(torch.arange(len(table)))
    assert found.keys() == expected.keys()
    for name in expected.keys() - {f"{name}.weight" for name in names}:
        assert torch.equal(found[name], expected[name].bfloat16())
    for name in names:
        layer: Any = model.get_submodule(name)
        again = make_layer(type(layer), expected[f"{name}.weight"], torch.bfloat16)
        assert torch.equal(exact_values(layer), exact_values(again))


@pytest.mark.parametrize(("num_layers", "num_kept"), [(1, 0), (4, 0), (6, 1), (28, 4), (36, 6)])
def test_first_layers_and_the_vision_tower_keep_their_weights(num_layers: int, num_kept: int) -> None:
    shapes = {f"language_model.layers.{one}.mlp.up_proj.weight": (32, 16) for one in range(num_layers)}
    others = {"language_model.layers.0.self_attn.q_norm.weight": (16,), "language_model.embed_tokens.weight": (64, 16)}
    names = eight_bit.eight_bit_names({**shapes, **others, "visual.blocks.26.mlp.linear_fc1.weight": (32, 16)})
    assert {int(name.split(".")[2]) for name in names} == set(range(num_kept, num_layers))
    assert names <= shapes.keys()


@pytest.mark.parametrize("weight_format", FORMATS)
def test_bytes_are_known_before_they_are_loaded(weight_format: WeightFormat, random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint, torch.bfloat16, CPU, weight_format)
    assert weights_bytes(check_weights(random_checkpoint), torch.bfloat16, CPU, weight_format) == sum(
        one.nbytes for one in model.state_dict().values()
    )


def test_weights_are_quantized_one_after_the_other(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other weight of a layer is in memory as it was read, and the file is not mapped as a whole."""
    monkeypatch.setattr(weights, "MAX_MAPPED_BYTES", 100_000)
    opened = 0
    safe_open = weights.safe_open

    def count(*args: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return safe_open(*args, **options)

    def check(model: nn.Module, name: str, *rest: Any) -> int:
        shapes = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
        for key in eight_bit.eight_bit_names(shapes):
            assert model.get_parameter(key).dtype == torch.int8, key
        return set_weight(model, name, *rest)

    set_weight = weights._set_weight
    monkeypatch.setattr(weights, "safe_open", count)
    monkeypatch.setattr(weights, "_set_weight", check)
    model = load_model(random_checkpoint, torch.float32, CPU, "int8")
    assert opened > 5
    monkeypatch.undo()
    for name, weight in load_model(random_checkpoint, torch.float32, CPU, "int8").state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_message_about_memory_proposes_int8(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.model.memory.free_bytes", lambda _: 1000)
    with pytest.raises(ModelUnavailable, match="set EMBEDDER_WEIGHTS=int8, or use"):
        check_memory(check_weights(random_checkpoint), torch.bfloat16, CPU)
    with pytest.raises(
        ModelUnavailable, match=r"as bfloat16 and int8; cpu has 0\.0 GiB free\. Serve a smaller checkpoint, or"
    ):
        check_memory(check_weights(random_checkpoint), torch.bfloat16, CPU, "int8")


# Vectors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_vectors_stay_near(dtype: Any, random_checkpoint: Path, embedder: Embedder) -> None:
    expected = np.stack(embedder.embed(ITEMS))
    with Embedder(str(random_checkpoint), device="cpu", dtype=dtype, weights="int8") as eight:
        vectors = np.stack(eight.embed(ITEMS))
        alone = np.concatenate([eight.embed([item]) for item in ITEMS])
        assert (eight.info()["dtype"], eight.info()["weights"]) == (dtype, "int8")
    assert MIN_COSINE["int8"] <= float((vectors * expected).sum(1).min()) < 0.999999
    assert np.abs(alone - vectors).max() <= (1e-6 if dtype == "float32" else 0.02)


def test_fp8_vectors_stay_near(random_checkpoint: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an emulation of the product on the CPU."""
    monkeypatch.setattr(torch, "_scaled_mm", emulated_scaled_mm)
    monkeypatch.setattr("embedder.loaded_model.check_weight_format", lambda *_: None)
    expected = np.stack(embedder.embed(ITEMS))
    with Embedder(str(random_checkpoint), device="cpu", dtype="bfloat16", weights="fp8") as eight:
        vectors = np.stack(eight.embed(ITEMS))
        assert eight.info()["weights"] == "fp8"
    assert MIN_COSINE["fp8"] <= float((vectors * expected).sum(1).min()) < MIN_COSINE["int8"]


def test_reranker_with_int8_scores_nearly_the_same(random_reranker: Path, reranker: Reranker) -> None:
    documents = [words(20, seed) for seed in range(6)]
    expected = np.array(reranker.score("a green car", documents))
    with Reranker(str(random_reranker), device="cpu", weights="int8") as eight:
        scores = np.array(eight.score("a green car", documents))
        assert eight.models.info()["weights"] == "int8"
    assert 0 < np.abs(scores - expected).max() < 0.02


def test_without_the_setting_no_layer_has_8_bits(embedder: Embedder) -> None:
    towers = (embedder.forward.language.tower, embedder.forward.vision.tower)
    assert not any(isinstance(one, EightBitLinear) for tower in towers for one in tower.modules())
    assert embedder.info()["weights"] == "float32"


# Refusals


def test_fp8_is_refused_on_a_cpu_with_what_to_do(random_checkpoint: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"the device is cpu\. Set EMBEDDER_WEIGHTS=int8"):
        Embedder(str(random_checkpoint), device="cpu", weights="fp8")


@pytest.mark.parametrize(
    ("capability", "dtype", "hip", "message"),
    [
        ((8, 6), torch.bfloat16, None, r"cuda:0 has 8\.6"),
        ((9, 4), torch.bfloat16, "6.4", "the device is cuda:0"),
        ((8, 9), torch.float16, None, "needs EMBEDDER_DTYPE=bfloat16 or auto; got float16"),
        ((9, 0), torch.float32, None, "got float32"),
    ],
    ids=["Ampere", "ROCm", "float16", "float32"],
)
def test_fp8_is_refused_where_there_is_no_product(
    capability: tuple[int, int], dtype: torch.dtype, hip: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(ModelUnavailable, match=message):
        check_weight_format("fp8", CUDA, dtype)
    check_weight_format("int8", CUDA, dtype)
    check_weight_format(None, CUDA, dtype)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_fp8_is_accepted_from_ada_on(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    check_weight_format("fp8", CUDA, torch.bfloat16)


# On a GPU, without one


@needs_fake_cuda
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("shape", ["tiny", *(pytest.param(one, marks=pytest.mark.slow) for one in ("2b", "8b"))])
def test_dry_run_forward_pass_on_a_gpu_does_not_wait_for_it(
    shape: str, weight_format: WeightFormat, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings()
    preprocessor = Preprocessor(
        load_tokenizer(random_checkpoint), read_vision_config(random_checkpoint, settings), settings
    )
    items = [EmbeddingItem((Text(words(9)),)), EmbeddingItem((Image(picture(64, 64)), Text("red")))]
    inputs = [preprocessor(item) for item in items]
    monkeypatch.setattr(cuda_graphs, "SIZES", (256,))
    with fake_cuda() as device:
        model = device.make_model(shape, weight_format=weight_format)
        num_products = sum(isinstance(one, EightBitLinear) for one in model.modules())
        forward = device.make_forward(model, preprocessor.vision, "varlen")
        counter = device.count(lambda: pool(forward(pack(inputs, preprocessor.vision.merge_size, forward.device))))
        assert counter.faults == []
        assert counter.device_to_host == 1
        if weight_format == "fp8":
            assert counter.kernels["_scaled_mm"] >= num_products  # more, if the prefix is computed first
        graphs = TextGraphs(forward.language, forward.device)
        assert device.count(lambda: pool(graphs(inputs[:1], graph_size(inputs[:1]) or 0))).faults == []


def test_layers_are_joined_and_keep_their_8_bits(random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint, torch.bfloat16, CPU, "int8")
    num_weights = sum(one.numel() for one in model.parameters())
    arrange_products(model)
    layers = model.language_model.layers
    joined = [layers[1].self_attn.qkv_proj, layers[-1].self_attn.kv_proj, layers[-1].mlp.gate_up_proj]
    assert all(isinstance(one, Int8Linear) for one in joined)
    added = sum(layer.self_attn.qk_norm_weight.numel() for layer in layers[:-1])
    assert added > 0
    assert sum(one.numel() for one in model.parameters()) == num_weights
