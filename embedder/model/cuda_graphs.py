"""A few texts -> their last tokens' states, by CUDA graphs of the language tower.

A short query is some dozens of tokens in hundreds of kernels, each over before the next is launched from Python; a
graph launches them all at once. It replays fixed shapes, so the texts are laid out with their whole prompts (of so few
tokens the prefix costs nothing: reading the weights takes the time) and filled up with one more item, never read.
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

SIZES = (32, 64, 128, 256)  # tokens of a graph
MAX_ITEMS = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Recorded:
    """A graph, the tensors that it reads, and the rows that it writes, (MAX_ITEMS + 1, hidden_size)."""

    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    rows: Tensor


class TextGraphs:
    """Graphs of one tower, recorded at the start, before the memory for batches is measured; all in one pool."""

    def __init__(self, language: Language, device: torch.device) -> None:
        self.language = language
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device), torch.inference_mode():
            self._recorded = {num_tokens: self._record(num_tokens) for num_tokens in SIZES}

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[ModelInput], num_tokens: int) -> Tensor:
        """(num_items, hidden_size), after the final norm. `num_tokens` is what `graph_size` gave."""
        with torch.cuda.device(self.device):  # a graph is recorded and replayed on the thread's own device
            recorded = self._recorded[num_tokens]
            _copy(pack(filled(inputs, num_tokens), 1, CPU), recorded.batch)
            recorded.graph.replay()
            return recorded.rows[: len(inputs)].clone()

    def _record(self, num_tokens: int) -> _Recorded:
        batch = _blank(num_tokens, self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch annotates it not
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # what allocates or loads at its first call does it here
            for _ in range(3):
                self.language(batch, None, [])
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            rows = self.language(batch, None, [])
        return _Recorded(graph, batch, rows)


def graph_size(inputs: Sequence[ModelInput]) -> int | None:
    """The smallest graph that holds these inputs, in tokens; None for too many, too long ones, and for pictures."""
    if len(inputs) > MAX_ITEMS or any(one.patches for one in inputs):
        return None
    total = sum(one.num_tokens for one in inputs)
    return next((size for size in SIZES if total <= size), None)


def filled(inputs: Sequence[ModelInput], num_tokens: int) -> list[ModelInput]:
    """The inputs with their prefixes as tokens of their own, and one more item of the tokens left over, if any."""
    whole = [replace(one, num_prefix_tokens=0) for one in inputs]
    left = num_tokens - sum(one.num_tokens for one in inputs)
    return [*whole, _filler(left)] if left else whole


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


def _blank(num_tokens: int, device: torch.device) -> PackedBatch:
    """The tensors that a graph reads: one item of all tokens, and behind it items of none."""
    one = pack([_filler(num_tokens)], 1, device)
    ends = torch.full((MAX_ITEMS + 2,), num_tokens, dtype=torch.int32, device=device)
    ends[0] = 0
    sequences = Sequences(ends, num_tokens, ())
    pooled = Sequences(torch.arange(MAX_ITEMS + 2, dtype=torch.int32, device=device), 1, ())
    pooled_index = torch.zeros(MAX_ITEMS + 1, dtype=torch.int64, device=device)
    return replace(one, sequences=sequences, keys=sequences, pooled=pooled, pooled_index=pooled_index)


def _copy(batch: PackedBatch, target: PackedBatch) -> None:
    """Into the tensors that the graph reads. Items of none keep the end of the row as theirs."""
    ends = target.sequences.cu_seqlens
    num_ends = len(batch.sequences.cu_seqlens)
    for values, place in (
        (batch.input_ids, target.input_ids),
        (batch.position_ids, target.position_ids),
        (batch.pooled_index, target.pooled_index[: len(batch.pooled_index)]),
        (batch.sequences.cu_seqlens, ends[:num_ends]),
    ):
        place.copy_(values.pin_memory(), non_blocking=True)  # pageable memory would wait for the batch before
    ends[num_ends:].fill_(len(batch.input_ids))
