"""The CUDA path without a GPU: the forward pass over fake CUDA tensors, and its values by an emulated kernel."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from benchmarks import gpu_counts, report
from benchmarks.fake_cuda import (
    CUDA,
    FLASH_KEYWORDS,
    FakeCuda,
    KernelCounter,
    fake_cuda,
    missing_requirement,
    no_capture,
    recorded_kernels,
)
from embedder.inputs.items import EmbeddingItem, Image, Part, Text, Video
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model import cuda_graphs, language
from embedder.model.attention import flash_attention, varlen_attention
from embedder.model.cuda_graphs import TextGraphs, graph_size
from embedder.model.devices import choose_dtype
from embedder.model.forward import Forward
from embedder.model.packing import pack
from embedder.model.pooling import pool
from embedder.model.products import join_layers
from embedder.model.sdpa import sdpa_attention
from embedder.model.weights import load_model
from embedder.settings import Settings
from tests.conftest import picture, words
from tests.model.test_attention import LENGTHS, naive_attention, randn, sequences

CPU = torch.device("cpu")
BACK_ENDS = {"varlen": varlen_attention, "flash_attn": flash_attention}

ignores_torch_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
needs_fake_cuda = pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")

CLIP = Video(tuple(picture(64, 96, seed) for seed in range(4)))
BATCHES: dict[str, list[tuple[Part, ...]]] = {
    "one short text": [(Text("red"),)],
    "texts": [(Text(words(length, length)),) for length in (1, 5, 5, 40, 60)],
    "images": [(Image(picture(64, 64, 1)),), (Image(picture(100, 300, 2)),)],
    "clips": [(CLIP,), (CLIP, Text("what moves"))],
    "mixture": [(Text("red"),), (Image(picture(90, 60, 3)), Text("a"), Image(picture(64, 64, 4)), CLIP)],
}


@pytest.fixture(scope="module")
def preprocessor(random_checkpoint: Path) -> Preprocessor:
    settings = Settings()
    return Preprocessor(load_tokenizer(random_checkpoint), read_vision_config(random_checkpoint, settings), settings)


def inputs_of(preprocessor: Preprocessor, batch: str) -> list[ModelInput]:
    """Preprocessed; every second item has another instruction, so that the batch has two prefixes."""
    items = [
        EmbeddingItem(parts, "Find the color." if index % 2 else None) for index, parts in enumerate(BATCHES[batch])
    ]
    return sorted(map(preprocessor, items), key=lambda one: one.num_tokens)


# The forward pass over fake CUDA tensors

COMBINATIONS = [
    pytest.param(shape, attention, version, id=f"{shape}-{attention}-torch-{version}")
    for shape in ("2b", "8b")
    for attention, version in (("varlen", "2.11"), ("varlen", "2.13"), ("flash_attn", "2.13"))
]


@pytest.mark.slow  # 10 CPU seconds each; in the default run, the next test but one runs the 2B's texts
@needs_fake_cuda
@pytest.mark.parametrize(("shape", "attention", "version"), COMBINATIONS)
def test_forward_pass_runs_on_a_gpu_without_waiting_for_it(
    shape: str, attention: str, version: str, preprocessor: Preprocessor
) -> None:
    """FakeTensorMode raises on a host sync, the recorded kernels on a call that the real ones refuse."""
    batches = {batch: inputs_of(preprocessor, batch) for batch in BATCHES}  # torch resizes the pictures, for real
    with fake_cuda(version) as device:
        forward = device.make_forward(device.make_model(shape), preprocessor.vision, attention)
        for batch, inputs in batches.items():
            counter = device.count(
                lambda inputs=inputs: pool(forward(pack(inputs, preprocessor.vision.merge_size, forward.device)))
            )
            assert counter.faults == [], batch
            assert counter.device_to_host == 1, batch  # the rows


@pytest.mark.slow
@needs_fake_cuda
def test_gpu_before_ampere_runs_sdpa_in_float16(preprocessor: Preprocessor) -> None:
    batches = {batch: inputs_of(preprocessor, batch) for batch in BATCHES}
    with fake_cuda(capability=(7, 5)) as device:
        assert choose_dtype(Settings(), CUDA, is_bundled=False) == torch.float16
        forward = device.make_forward(device.make_model("tiny", torch.float16), preprocessor.vision, "auto")
        assert forward.attention_name == "sdpa"
        for batch, inputs in batches.items():
            counter = device.count(
                lambda inputs=inputs: pool(forward(pack(inputs, preprocessor.vision.merge_size, forward.device)))
            )
            assert counter.faults == [], batch
            assert counter.device_to_host == 1, batch


@needs_fake_cuda
def test_graphs_of_texts_are_captured_and_fed_without_waiting(
    preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "SIZES", (256,))
    with fake_cuda() as device:
        forward = device.make_forward(device.make_model("2b"), preprocessor.vision, "varlen")
        graphs = TextGraphs(forward.language, forward.device)
        for num_items in (1, 2):
            inputs = inputs_of(preprocessor, "texts")[:num_items]
            counter = device.count(lambda inputs=inputs: pool(graphs(inputs, graph_size(inputs) or 0)))
            assert counter.faults == []
            assert counter.device_to_host == 1


@needs_fake_cuda
@pytest.mark.slow
@pytest.mark.timeout(600)
@ignores_torch_warning
@pytest.mark.parametrize("weights", [None, "int8", "fp8"])
@pytest.mark.parametrize("shape", ["2b", "8b"])
def test_no_change_adds_kernels_or_copies(shape: str, weights: Any) -> None:
    """`python -m benchmarks.gpu_counts` records new counts, for a change that is worth them."""
    recorded = recorded_counts()[f"{shape}, {weights}" if weights else shape]
    counted = gpu_counts.count_shape(shape, weights)
    assert counted.keys() == recorded.keys()
    for batch, one in counted.items():
        for name in ("kernels", "products", "host_to_device_copies"):
            assert one[name] <= recorded[batch][name], f"{name} of {batch}"
        assert one["tflop"] == pytest.approx(recorded[batch]["tflop"], rel=0.01)


def recorded_counts() -> dict[str, dict[str, dict[str, float]]]:
    content = json.loads((report.RESULTS / f"{gpu_counts.FILE}.json").read_text(encoding="utf-8"))
    return gpu_counts.all_counts(content)


def test_recorded_query_of_the_default_takes_at_most_350_kernels() -> None:
    """Graphs of compiled layers, with every format of the weights of the 2B."""
    recorded = recorded_counts()
    assert recorded["2b"]["query, CUDA graph, compiled"]["kernels"] <= 350
    for counts in recorded.values():
        assert counts["query, CUDA graph, compiled"]["kernels"] < counts["query, CUDA graph"]["kernels"]
        assert counts["query, CUDA graph, compiled"]["host_to_device_copies"] == 1


# Compiled layers


@pytest.fixture(scope="module")
def compiled_kernels() -> Any:
    """Imports torch's compiler, before there is a fake device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("benchmarks.compiled_layers").compiled_kernels


@needs_fake_cuda
def test_inductor_makes_few_kernels_of_a_language_layer(compiled_kernels: Any, device: FakeCuda) -> None:
    """A norm, the scale of the heads, their rotation; a sum with a norm, the activation, and a sum."""
    layer = device.make_model("tiny").language_model.layers[1]
    states, cos, sin = (torch.empty(16, size, dtype=torch.bfloat16, device=CUDA) for size in (192, 32, 32))
    attended = torch.empty(16, 6, 32, dtype=torch.bfloat16, device=CUDA)
    before = compiled_kernels(lambda *given: language._query_key_value(layer, *given), (states, cos, sin))
    after = compiled_kernels(lambda *given: language._output_and_mlp(layer, *given), (states, attended))
    assert (before.products, after.products) == (1, 3)
    assert (before.copies, after.copies) == (0, 0)
    assert before.fused <= 3
    assert after.fused <= 3


@needs_fake_cuda
def test_matrix_that_a_product_adds_is_counted_as_a_copy(compiled_kernels: Any, device: FakeCuda) -> None:
    matrix, states, weight = (torch.empty(32, 32, dtype=torch.bfloat16, device=CUDA) for _ in range(3))
    found = compiled_kernels(torch.addmm, (matrix, states, weight))
    assert (found.products, found.copies, found.fused) == (1, 1, 0)
    found = compiled_kernels(torch.addmm, (matrix[0], states, weight))  # a bias
    assert (found.products, found.copies, found.fused) == (1, 0, 0)


@needs_fake_cuda
@pytest.mark.usefixtures("compiled_kernels")
def test_tracing_a_compiled_layer_is_not_counted(preprocessor: Preprocessor) -> None:
    """The first pass traces each kind of layer, the second one none."""
    inputs = inputs_of(preprocessor, "one short text")
    with fake_cuda() as device:
        model = device.make_model("tiny")
        eager = device.make_forward(model, preprocessor.vision, "varlen")
        compiled = device.make_forward(model, preprocessor.vision, "varlen", is_compiled=True)

        def count(forward: Forward) -> KernelCounter:
            return device.count(lambda: pool(forward(pack(inputs, preprocessor.vision.merge_size, forward.device))))

        for forward in (eager, compiled):
            count(forward)  # computes the prefix
        first, second, plain = count(compiled), count(compiled), count(eager)
    assert (first.kernels, first.flops) == (second.kernels, second.flops)
    assert first.flops == plain.flops
    assert first.num_kernels < plain.num_kernels


# The dry run finds each kind of fault


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


@needs_fake_cuda
@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
    ],
)
def test_host_sync_raises(wait: Callable[[Tensor], object], device: FakeCuda) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)):
        wait(torch.empty(4, device=CUDA))


@needs_fake_cuda
def test_tensor_on_the_cpu_is_found(device: FakeCuda) -> None:
    table, index = torch.empty(4, 8, device=CUDA), torch.tensor([0, 1])
    assert device.count(lambda: table[index]).faults == ["index takes tensors on the CPU, of shapes [(2,)]"]


@needs_fake_cuda
def test_product_in_float32_is_found(device: FakeCuda) -> None:
    states, weight = torch.empty(4, 8, device=CUDA), torch.empty(2, 8, device=CUDA)
    with torch.inference_mode():
        assert device.count(lambda: F.linear(states, weight)).faults == ["linear of (4, 2) in float32"]


@needs_fake_cuda
def test_copy_to_the_host_is_counted(device: FakeCuda) -> None:
    states = torch.empty(4, 8, device=CUDA)
    counter = device.count(lambda: states.cpu())
    assert (counter.device_to_host, counter.host_to_device, counter.num_kernels) == (1, 0, 0)


@needs_fake_cuda
@pytest.mark.parametrize("fault", ["float32 states", "int64 cu_seqlens", "cu_seqlens on the CPU", "strided head_dim"])
def test_varlen_call_that_the_kernel_refuses_raises(fault: str, device: FakeCuda) -> None:
    states = torch.empty(6, 4, 64, dtype=torch.float32 if fault == "float32 states" else torch.bfloat16, device=CUDA)
    if fault == "strided head_dim":
        states = torch.empty(6, 64, 4, dtype=torch.bfloat16, device=CUDA).transpose(1, 2)
    cu_seqlens = torch.empty(
        3,
        dtype=torch.int64 if fault == "int64 cu_seqlens" else torch.int32,
        device=CPU if fault == "cu_seqlens on the CPU" else CUDA,
    )
    where = replace(sequences([3, 3]), cu_seqlens=cu_seqlens)
    with pytest.raises(AssertionError):
        varlen_attention(states, states, states, where, where, causal=True)


def test_keyword_that_a_torch_version_lacks_raises() -> None:
    with recorded_kernels("2.11", emulated_kernel), pytest.raises(TypeError, match="num_splits"):
        torch.ops.aten._flash_attention_forward(num_splits=1)


def test_recorded_keywords_are_those_of_this_torch() -> None:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    keywords = tuple(argument.name for argument in schema.arguments if argument.kwarg_only)
    assert keywords == FLASH_KEYWORDS[".".join(torch.__version__.split(".")[:2])]


# Values, by an emulated kernel on the CPU


def emulated_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
) -> Tensor:
    """Flash attention's semantics, sequence by sequence: causal masks aligned at the ends, zeros where no key is."""
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert (int(cu_queries[-1]), int(cu_keys[-1])) == (len(query), len(key))
    assert max(cu_queries.diff().tolist()) <= max_queries
    assert max(cu_keys.diff().tolist()) <= max_keys
    attended = torch.full_like(query, float("nan"))
    query_parts = query.split(cu_queries.diff().tolist())
    parts = zip(query_parts, *(one.split(cu_keys.diff().tolist()) for one in (key, value)), strict=True)
    for target, part in zip(attended.split(cu_queries.diff().tolist()), parts, strict=True):
        num_queries, num_keys = len(part[0]), len(part[1])
        if num_queries and num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries) if causal else None
            heads = (one.transpose(0, 1) for one in part)
            values = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=query.shape[1] > key.shape[1])
            target.copy_(values.transpose(0, 1))
        else:
            target.zero_()
    return attended


@pytest.mark.parametrize("version", FLASH_KEYWORDS)
@pytest.mark.parametrize("name", BACK_ENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_back_ends_are_a_softmax_per_sequence(version: str, name: str, causal: bool) -> None:
    keys = [length + 3 for length in LENGTHS]
    query, key, value = randn(sum(LENGTHS), 4, 8), randn(sum(keys), 2, 8, seed=1), randn(sum(keys), 2, 8, seed=2)
    where = sequences(LENGTHS, paired_with=keys), sequences(keys, paired_with=LENGTHS)
    with recorded_kernels(version, emulated_kernel):
        attended = BACK_ENDS[name](query, key, value, *where, causal=causal)
    assert (attended - naive_attention(query, key, value, LENGTHS, keys, causal)).abs().max() < 1e-5
    assert (attended - sdpa_attention(query, key, value, *where, causal=causal)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> Any:
    loaded: Any = load_model(random_checkpoint, torch.float32, CPU)
    join_layers(loaded.language_model.layers)
    return loaded


def varlen_forward(model: Any, preprocessor: Preprocessor, name: str) -> Forward:
    forward = Forward(model, preprocessor.vision, "sdpa")
    forward.language.attention = forward.vision.attention = BACK_ENDS[name]
    return forward


@pytest.mark.parametrize("name", BACK_ENDS)
def test_varlen_back_ends_give_the_states_of_sdpa(name: str, model: Any, preprocessor: Preprocessor) -> None:
    inputs = [one for batch in BATCHES for one in inputs_of(preprocessor, batch)]
    expected = Forward(model, preprocessor.vision, "sdpa")(pack(inputs, 2, CPU))
    with recorded_kernels("2.13", emulated_kernel):
        rows = varlen_forward(model, preprocessor, name)(pack(inputs, 2, CPU))
    assert torch.allclose(rows, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class EmulatedGraphs(TextGraphs):
    """Graphs whose replay runs the tower again, on the static tensors, as a CUDA graph does."""

    def _capture(self, num_tokens: int) -> Any:
        captured = super()._capture(num_tokens)

        def replay() -> None:
            captured.rows.copy_(self.language(captured.batch, None, []))

        return replace(captured, graph=SimpleNamespace(replay=replay))


def test_replayed_graphs_give_the_states_of_the_plain_forward_pass(model: Any, preprocessor: Preprocessor) -> None:
    """A graph's static tensors keep nothing of the batch before."""
    texts = [preprocessor(EmbeddingItem((Text(words(length, length)),))) for length in (1, 2, 3, 5, 9, 13)]
    plain = Forward(model, preprocessor.vision, "sdpa")
    batches = ([0], [5, 4], [0], [1, 2, 0], [4], [3, 3], [5, 0, 1], [0, 0, 0], [5], [2], [4, 4], [0])
    used: set[int] = set()
    with ExitStack() as stack:
        stack.enter_context(recorded_kernels("2.13", emulated_kernel))
        stack.enter_context(no_capture())
        graphs = EmulatedGraphs(varlen_forward(model, preprocessor, "varlen").language, CPU)
        for batch in batches:
            inputs = [texts[index] for index in batch]
            size = graph_size(inputs)
            assert size is not None
            used.add(size)
            rows, expected = graphs(inputs, size), plain(pack(inputs, 1, CPU))
            assert torch.allclose(rows, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert used >= {64, 128, 256}  # this tokenizer needs more than 32 tokens for the prompt
