"""A CUDA device without a GPU: tensors that have a shape, a dtype and a device, but no values.

`fake_cuda()` runs the project's own forward pass over torch's FakeTensorMode. An operation that would wait for the GPU
raises, and so does a call that the varlen kernels or an older torch refuse. `KernelCounter` counts what reaches the
device, and notes operations on a wrong device or in float32. A CPU build of torch lacks a CUDA device guard, so
`load_device_guard` compiles one that does nothing (g++, 3 s).
"""

from __future__ import annotations

import collections
import importlib.machinery
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths

from benchmarks.checkpoints import tokenizer
from benchmarks.random_checkpoint import shape_config
from embedder.inputs.processor_config import VisionConfig
from embedder.model import language
from embedder.model import vision as vision_module
from embedder.model.architecture import Architecture
from embedder.model.attention import Attention, flash_attn_import_error, num_splits_argument
from embedder.model.eight_bit import use_eight_bit_layers
from embedder.model.forward import Forward
from embedder.model.modules import Towers
from embedder.model.packing import Sequences
from embedder.model.products import arrange_products
from embedder.settings import WeightFormat

if TYPE_CHECKING:
    from benchmarks.compiled_layers import CompiledKernels

CUDA = torch.device("cuda", 0)

# Keyword-only arguments of torch.ops.aten._flash_attention_forward by version of torch, from each version's schema.
_TORCH_2_11 = ("scale", "window_size_left", "window_size_right", "seqused_k", "alibi_slopes")
FLASH_KEYWORDS = {"2.11": _TORCH_2_11, "2.13": (*_TORCH_2_11, "block_table", "num_splits")}

# Operators without a kernel: views, and tensors that are allocated but not written.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "lift_fresh", "new_empty"}
_SHAPES = {"expand", "flatten", "permute", "reshape", "_reshape_alias", "squeeze", "t", "transpose", "unflatten"}
_SHAPES |= {"unsqueeze", "view", "_unsafe_view", "as_strided", "alias", "detach", "is_same_size", "sym_size"}
_PARTS = {"chunk", "narrow", "select", "slice", "split", "split_with_sizes", "unbind"}
PRODUCTS = ("linear", "mm", "addmm", "addmm_", "bmm", "matmul", "_scaled_mm")
_FREE = _ALLOCATIONS | _SHAPES | _PARTS
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


def missing_requirement() -> str | None:
    """Why this machine cannot run `fake_cuda`, or None if it can."""
    if torch.version.cuda is None and not shutil.which("g++"):
        return "a CPU build of torch needs g++ for the CUDA device guard"
    return None


@cache
def load_device_guard() -> None:
    """Register a CUDA device guard that does nothing, which a CPU build of torch lacks."""
    if torch.version.cuda is not None:
        return
    search = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths()), "-lc10"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        compile_guard = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(source), *search, "-o", str(library)]
        subprocess.run(compile_guard, check=True)  # noqa: S603
        torch.ops.load_library(library)


class KernelCounter(TorchDispatchMode):
    """Counts kernels, copies and FLOPs of what runs inside it.

    `kernels`: by operator; one call is one kernel. `us`: by operator, the roofline's time on an H200: the longest of
    FLOPs / rate, bytes / bandwidth, and the shortest kernel. `faults`: operations on a wrong device or in float32.
    """

    FLOP_PER_S, FLASH_FLOP_PER_S, BYTES_PER_S = 790e12, 350e12, 4.3e12  # two measured on an H200; FlashAttention-2
    MIN_KERNEL_US = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.us: collections.Counter[str] = collections.Counter()
        self.flops = 0.0
        self.attention_flops = 0.0
        self.host_to_device = self.device_to_host = 0
        self.faults: list[str] = []
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.is_paused:
            return out
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        name = func._overloadpacket.__name__
        devices = {tensor.device.type for tensor in inputs + outputs}
        if name in ("to", "_to_copy", "copy_") and devices == {"cpu", "cuda"}:
            self._count_transfer(args[0] if name == "copy_" else outputs[0])
        elif devices == {"cuda"} and self._is_kernel(func, name, args, outputs):
            self._count_kernel(name, args, inputs, outputs)
        elif "cuda" in devices and "cpu" in devices:
            shapes = [tuple(tensor.shape) for tensor in inputs + outputs if tensor.device.type == "cpu"]
            if any(shape for shape in shapes):  # a CPU scalar is an argument of the kernel
                self.faults.append(f"{name} takes tensors on the CPU, of shapes {shapes}")
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of what runs inside."""
        self.is_paused = True
        yield
        self.is_paused = False

    @contextmanager
    def as_compiled(self, kernels: CompiledKernels) -> Iterator[None]:
        """Count what runs inside as `kernels`; the products as they are."""
        before, us_before = self.kernels.copy(), self.us.copy()
        yield
        products = sum((self.kernels - before)[name] for name in PRODUCTS)
        assert products == kernels.products, f"{products} products in eager mode, {kernels.products} compiled"
        for counts, earlier in ((self.kernels, before), (self.us, us_before)):
            for name in set(counts) - set(PRODUCTS):
                counts[name] = earlier[name]
        self.kernels["compiled"] += kernels.fused + kernels.copies
        self.us["compiled"] += max(
            kernels.fused_bytes / self.BYTES_PER_S * 1e6, (kernels.fused + kernels.copies) * self.MIN_KERNEL_US
        )

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    @property
    def roofline_ms(self) -> float:
        return self.us.total() / 1e3

    def _is_kernel(self, func: Any, name: str, args: Any, outputs: list[Tensor]) -> bool:
        if func.namespace == "prim" or name in _FREE:
            return False
        return not (name == "to" and outputs[0].dtype == args[0].dtype)

    def _count_transfer(self, target: Tensor) -> None:
        if target.device.type == "cuda":
            self.host_to_device += 1
        else:
            self.device_to_host += 1

    def _count_kernel(self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in inputs + outputs)
        if name in ("embedding", "index_select", "index"):  # reads only the rows that it returns
            num_bytes = 2 * sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        elif name in ("index_add_", "index_put_"):
            num_bytes = 3 * inputs[-1].numel() * inputs[-1].element_size()
        flops, rate = 0.0, self.FLOP_PER_S
        if "flash" in name:
            flops, rate = self.attention_flops, self.FLASH_FLOP_PER_S
        elif name in PRODUCTS:
            weight = args[2] if name.startswith("addmm") else args[1]
            flops = 2.0 * outputs[0].numel() * weight.shape[-1 if name == "linear" else -2]
            if outputs[0].dtype == torch.float32:
                self.faults.append(f"{name} of {tuple(outputs[0].shape)} in float32")
        self.kernels[name] += 1
        self.flops += flops
        self.us[name] += max(flops / rate * 1e6, num_bytes / self.BYTES_PER_S * 1e6, self.MIN_KERNEL_US)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def check_varlen_call(
    query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> None:
    """The TORCH_CHECKs of `mha_varlen_fwd` (torch 2.13, flash-attn 2.8), which a fake tensor does not run."""
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert all(tensor.device.type == "cuda" for tensor in (query, key, value, cu_queries, cu_keys))
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert cu_queries.is_contiguous()
    assert cu_keys.is_contiguous()
    assert cu_queries.numel() == cu_keys.numel() > 1
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape == value.shape
    assert type(max_queries) is type(max_keys) is int
    assert min(max_queries, max_keys) > 0
    if max_queries == 1 and query.shape[1] > key.shape[1]:  # the kernel then treats the heads of a group as queries
        assert query.shape[0] == cu_queries.numel() - 1


class FlashOperator:
    """`torch.ops.aten._flash_attention_forward` with the arguments of one version of torch; `run` computes."""

    def __init__(self, keywords: tuple[str, ...], run: Callable[..., Any]) -> None:
        arguments = [types.SimpleNamespace(name=name) for name in keywords]
        self.default = types.SimpleNamespace(_schema=types.SimpleNamespace(arguments=arguments))
        self.keywords = {*keywords, "return_debug_mask"}
        self.run = run

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if unknown := set(keywords) - self.keywords:
            raise TypeError(f"_flash_attention_forward() got unexpected keyword arguments {sorted(unknown)}")
        return self.run(*args, **keywords)


def flash_attn_package(run: Callable[..., Tensor]) -> types.ModuleType:
    """A module flash_attn with the signature of 2.8.3; `run` computes."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        return run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)

    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


@contextmanager
def recorded_kernels(version: str, run: Callable[..., Tensor]) -> Iterator[None]:
    """Torch's operator as in `version`, and the flash-attn package, both computed by `run`.

    Arguments of `run`: query, key, value, cu_seqlens of queries and of keys, max_seqlen of each, causal.
    """

    def run_operator(*args: Any, **keywords: Any) -> tuple[Tensor]:
        *tensors, dropout, causal = args
        assert dropout == 0.0
        assert (keywords["window_size_left"], keywords["window_size_right"]) == (-1, 0 if causal else -1)
        return (run(*tensors, causal),)

    operator = FlashOperator(FLASH_KEYWORDS[version], run_operator)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.ops.aten, "_flash_attention_forward", operator))
        stack.enter_context(mock.patch.dict(sys.modules, {"flash_attn": flash_attn_package(run)}))
        for cached in (num_splits_argument, flash_attn_import_error):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield


def emulated_scaled_mm(
    states: Tensor,
    weight: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """The values of `torch._scaled_mm` with a scale for each row and column, added up in float32."""
    assert states.dtype == weight.dtype == torch.float8_e4m3fn
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert (scale_a.shape, scale_b.shape) == ((len(states), 1), (1, weight.shape[1]))
    assert states.is_contiguous()
    assert weight.t().is_contiguous()
    assert not any(size % 16 for size in weight.shape)
    assert out_dtype == torch.bfloat16
    assert bias is None or bias.dtype == out_dtype
    assert scale_result is None
    output = (states.float() @ weight.float()) * scale_a * scale_b
    return (output if bias is None else output + bias.float()).to(out_dtype)


class FakeCuda:
    """Models and measurements on the fake device; `fake_cuda` makes one."""

    def __init__(self) -> None:
        self._counter: KernelCounter | None = None

    def make_model(
        self, shape: str, dtype: torch.dtype = torch.bfloat16, weight_format: WeightFormat | None = None
    ) -> Any:
        """Both towers of `shape`, arranged for the forward pass."""
        config = Architecture.model_validate_json(shape_config(shape, tokenizer()).to_json_string(use_diff=False))
        with unset_fake_temporarily(), torch.device("meta"):  # its initialization draws random numbers
            model = Towers(config).to(dtype).eval().requires_grad_(False)
            if weight_format:
                use_eight_bit_layers(model, weight_format, dtype)
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA))
        arrange_products(model)
        return model

    def make_forward(self, model: Any, vision: VisionConfig, attention: str, *, is_compiled: bool = False) -> Forward:
        """The project's forward pass; its attention also reports FLOPs to the counter.

        Compiled layers give the values of eager ones, and the counter gets the kernels that Inductor makes of them.
        """
        with ExitStack() as stack:
            for module in (language, vision_module):
                stack.enter_context(mock.patch.object(module, "compile_if", self._compile_if))
            forward = Forward(model, vision, attention, is_compiled=is_compiled)
        forward.vision.attention = self._with_flops(forward.vision.attention)
        forward.language.attention = self._with_flops(forward.language.attention)
        return forward

    def count(self, run: Callable[[], object]) -> KernelCounter:
        """What `run` sends to the device."""
        counter = self._counter = KernelCounter()
        with counter:
            run()
        self._counter = None
        return counter

    def _compile_if(self, is_compiled: bool, function: Callable[..., Any]) -> Callable[..., Any]:
        if not is_compiled:
            return function
        from benchmarks.compiled_layers import compiled_kernels  # the caller has imported it, without a fake device

        known: dict[object, CompiledKernels] = {}

        def call(layer: Any, *states: Tensor) -> Any:
            if self._counter is None:
                return function(layer, *states)
            kinds = tuple(type(one) for one in layer.modules())
            key = (kinds, tuple(one.shape for one in states))
            if key not in known:
                with self._counter.paused():
                    known[key] = compiled_kernels(lambda *given: function(layer, *given), states)
            with self._counter.as_compiled(known[key]):
                return function(layer, *states)

        return call

    def _with_flops(self, attention: Attention) -> Attention:
        def attend(
            query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
        ) -> Tensor:
            if self._counter:
                self._counter.attention_flops = attention_flops(queries, keys, causal) * query.shape[1] * query.shape[2]
            return attention(query, key, value, queries, keys, causal=causal)

        return attend


def attention_flops(queries: Sequences, keys: Sequences, causal: bool) -> float:
    """FLOPs of two products for each pair of a query and a key that it attends, by head and head dimension."""
    total = 0.0
    for query_run, key_run in zip(queries.runs, keys.runs, strict=True):
        length = query_run.length
        num_pairs = length * key_run.length - (length * (length - 1) / 2 if causal else 0)
        total += 4.0 * query_run.count * num_pairs
    return total


@contextmanager
def fake_cuda(version: str = "2.13", capability: tuple[int, int] = (9, 0)) -> Iterator[FakeCuda]:
    """A fake CUDA device with the flash attention operator as torch `version` has it.

    Tensors made from numpy arrays are fake too; pinning, streams, events and the capture of a graph do nothing.
    """
    load_device_guard()
    operator = torch.ops.aten._flash_attention_forward
    from_numpy = torch.from_numpy
    mode = FakeTensorMode(allow_non_fake_inputs=False)

    def attend(*args: Any) -> Tensor:
        *tensors, causal = args
        check_varlen_call(*tensors)
        with mock.patch.object(
            torch.ops.aten, "_flash_attention_forward", operator
        ):  # the dispatcher looks it up there
            attended: Tensor = operator(*tensors, 0.0, causal, return_debug_mask=False)[0]
        return attended

    with ExitStack() as stack:
        stack.enter_context(recorded_kernels(version, attend))
        stack.enter_context(mock.patch.object(torch, "from_numpy", lambda array: mode.from_tensor(from_numpy(array))))
        stack.enter_context(no_capture(capability))
        stack.enter_context(mode)
        yield FakeCuda()


@contextmanager
def no_capture(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Replaces pinning, streams, events and the capture of CUDA graphs by functions that do nothing."""
    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    event = types.SimpleNamespace(record=lambda _: None, synchronize=lambda: None)
    with (
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.multiple(
            torch.cuda,
            get_device_capability=lambda _=None: capability,
            graph_pool_handle=lambda: None,
            device=lambda _: nullcontext(),
            Stream=lambda _=None: stream,
            stream=lambda _: nullcontext(),
            current_stream=lambda _=None: stream,
            Event=lambda **_: event,
            CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: None),
            graph=lambda *_, **__: nullcontext(),
        ),
    ):
        yield
