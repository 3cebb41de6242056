"""CUDA graphs of the language tower, for batches of a few short texts.

A short query needs hundreds of kernels, and each ends before Python launches the next. A graph launches all of them at
once. It replays fixed shapes, so a batch is padded to the graph's size by one filler item, whose row is dropped. Items
keep their prefix as ordinary tokens: at this size the time goes into reading the weights, so sharing a prefix saves
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from embedder.inputs.preprocess import ModelInput
from embedder.model.language import Language
from embedder.model.packing import PackedBatch, Sequences, pack

SIZES = (32, 64, 128, 256)  # tokens of each graph
MAX_ITEMS = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class _CapturedGraph:
    """A graph, its static input tensors, and its static output, (MAX_ITEMS + 1, hidden_size)."""

    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    rows: Tensor


class TextGraphs:
    """One graph of the language tower for each of `SIZES`, in one memory pool.

    Capture them before the memory for batches is measured, because they keep their memory.
    """

    def __init__(self, language: Language, device: torch.device) -> None:
        self.language = language
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device), torch.inference_mode():
            self._graphs = {num_tokens: self._capture(num_tokens) for num_tokens in SIZES}

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[ModelInput], num_tokens: int) -> Tensor:
        """(num_items, hidden_size), after the final norm. `num_tokens` is the result of `graph_size(inputs)`."""
        with torch.cuda.device(self.device):  # capture and replay must happen on the thread's current device
            captured = self._graphs[num_tokens]
            _copy_into(captured.batch, pack(pad_to_size(inputs, num_tokens), 1, CPU))
            captured.graph.replay()
            return captured.rows[: len(inputs)].clone()

    def _capture(self, num_tokens: int) -> _CapturedGraph:
        batch = _static_batch(num_tokens, self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch annotates it not
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # kernels are loaded and workspaces allocated before the capture
            for _ in range(3):
                self.language(batch, None, [])
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            rows = self.language(batch, None, [])
        return _CapturedGraph(graph, batch, rows)


def graph_size(inputs: Sequence[ModelInput]) -> int | None:
    """Tokens of the smallest graph that holds these inputs; None if there are too many, or any has an image."""
    if len(inputs) > MAX_ITEMS or any(one.patches for one in inputs):
        return None
    total = sum(one.num_tokens for one in inputs)
    return next((size for size in SIZES if total <= size), None)


def pad_to_size(inputs: Sequence[ModelInput], num_tokens: int) -> list[ModelInput]:
    """The inputs without shared prefixes, and a filler item of the tokens that are missing, if any."""
    whole = [one.without_prefix() for one in inputs]
    missing = num_tokens - sum(one.num_tokens for one in inputs)
    return [*whole, _filler(missing)] if missing else whole


def _filler(num_tokens: int) -> ModelInput:
    return ModelInput(
        input_ids=np.zeros(num_tokens, np.int64),
        position_ids=np.tile(np.arange(num_tokens), (3, 1)),
        visual_index=np.empty(0, np.int64),
        patches=(),
        num_prefix_tokens=0,
        num_cut_tokens=0,
        cost=num_tokens,
    )


def _static_batch(num_tokens: int, device: torch.device) -> PackedBatch:
    """The tensors that a graph reads: one item of all tokens, then `MAX_ITEMS` empty items."""
    batch = pack([_filler(num_tokens)], 1, device)
    cu_seqlens = torch.full((MAX_ITEMS + 2,), num_tokens, dtype=torch.int32, device=device)
    cu_seqlens[0] = 0
    sequences = Sequences(cu_seqlens, num_tokens, ())
    pooled = Sequences(torch.arange(MAX_ITEMS + 2, dtype=torch.int32, device=device), 1, ())
    pooled_index = torch.zeros(MAX_ITEMS + 1, dtype=torch.int64, device=device)
    return replace(batch, sequences=sequences, keys=sequences, pooled=pooled, pooled_index=pooled_index)


def _copy_into(target: PackedBatch, batch: PackedBatch) -> None:
    """Copy a batch on the host into a graph's static tensors. Items that it does not have become empty ones."""
    cu_seqlens = target.sequences.cu_seqlens
    num_ends = len(batch.sequences.cu_seqlens)
    for source, destination in (
        (batch.input_ids, target.input_ids),
        (batch.position_ids, target.position_ids),
        (batch.pooled_index, target.pooled_index[: len(batch.pooled_index)]),
        (batch.sequences.cu_seqlens, cu_seqlens[:num_ends]),
    ):
        destination.copy_(source.pin_memory(), non_blocking=True)  # from pageable memory it would wait for the GPU
    cu_seqlens[num_ends:].fill_(len(batch.input_ids))
