"""The kernels that Inductor makes of compiled layers for a GPU, without a GPU and without Triton.

Inductor decides what it fuses and writes the source of each kernel before Triton translates it. So a function over fake
CUDA tensors is traced and lowered, and the calls in the generated code are counted. The numbers of tokens are fixed
here, while the service compiles for any number; the translation by Triton is not tried.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as interfaces
import torch.utils._triton
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[..., Any]

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    gcnArchName="",  # asked for by a build of torch without CUDA
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 2**30,
    L2_cache_size=50 * 2**20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
)


@dataclass(frozen=True)
class CompiledKernels:
    """What one call of a compiled function launches. `products`: the library's; `fused`: the kernels of Inductor.

    A product that adds a matrix first copies this matrix to its output: `copies`.
    """

    products: int
    fused: int
    copies: int
    fused_bytes: int  # read and written by the kernels of Inductor


def compiled_kernels(function: Function, args: tuple[Tensor, ...]) -> CompiledKernels:
    """Lower `function` of fake CUDA tensors. Modules and other tensors that it reads become arguments."""
    mode = detect_fake_mode(args)
    with described_gpu(), mock.patch.object(torch.compiler, "is_compiling", return_value=True), torch.no_grad():
        graph, values = _traced(function, args)
        with (
            unset_fake_temporarily(),
            V.set_fake_mode(mode),
            V.set_debug_handler(DebugContext()),
            tracing(TracingContext(mode)),
        ):
            post_grad_passes(graph, True)
            copies = sum(map(_adds_matrix, graph.graph.nodes))
            lowered = GraphLowering(graph, example_inputs=values, is_inference=True)
            with V.set_graph_handler(lowered):
                lowered.run(*values)
                code = lowered.codegen()[0].value
                node_bytes = lowered.count_bytes()[1]
    lines = [line.strip() for line in code.splitlines()]
    fused = [line for line in lines if line.startswith("triton_") and ".run(" in line]
    products = [line for line in lines if line.startswith("extern_kernels.")]
    return CompiledKernels(
        fused=len(fused),
        products=len(products),
        copies=copies,
        fused_bytes=sum(int(num_bytes) for node, num_bytes in node_bytes if not node.is_extern()),
    )


def _adds_matrix(node: fx.Node) -> bool:
    """Whether a product adds a matrix to its result. A vector, the bias, is added by the product's own kernel."""
    if node.target is not torch.ops.aten.addmm.default or not isinstance(node.args[0], fx.Node):
        return False
    return bool(node.args[0].meta["val"].dim() > 1)


@contextmanager
def described_gpu() -> Iterator[None]:
    """Lets Inductor generate code for an H200, and not look for Triton."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_compute_capability": 90,
    }
    owners = (torch.cuda, interfaces.CudaInterface, interfaces.CudaInterface.Worker)
    with ExitStack() as stack:
        for owner, (name, answer) in itertools.product(owners, answers.items()):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, mock.Mock(return_value=answer)))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", return_value=True))
        stack.enter_context(mock.patch.object(torch.utils._triton, "triton_hash_with_backend", return_value=""))
        yield


def _traced(function: Function, args: tuple[Tensor, ...]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The operators of `function` without in-place ones, and their inputs: the arguments and the weights."""
    functional = torch.func.functionalize(function, remove="mutations_and_views")
    traced = make_fx(functional, decomposition_table=select_decomp_table(), _allow_non_fake_inputs=True)(*args)
    values = list(args)
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[str, fx.Node] = {}
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in inputs:
            with traced.graph.inserting_after(last):
                last = inputs[name] = traced.graph.placeholder(name)
            last.meta = {**node.meta, "val": getattr(traced, name)}
            values.append(last.meta["val"])
        node.replace_all_uses_with(inputs[name])
        traced.graph.erase_node(node)
    traced.recompile()
    return traced, values
