"""CUDA graphs of the language tower, for batches of a few short texts.

A short query needs hundreds of kernels, and each ends before Python launches the next. A graph launches all of them at
once. It replays fixed shapes, so a batch is padded to the graph's size by one filler item, whose row is dropped. Items
keep their prefix as ordinary tokens: at this size the time goes into reading the weights, so sharing a prefix saves
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedder.inputs.preprocess import ModelInput
from embedder.model.language import Language
from embedder.model.packing import PackedBatch, Sequences, pack

SIZES = (32, 64, 128, 256)  # tokens of each graph
MAX_ITEMS = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class _CapturedGraph:
    """A graph, the bytes of its static inputs, these as a batch, and its output, (MAX_ITEMS + 1, hidden_size)."""

    graph: torch.cuda.CUDAGraph
    buffer: Tensor
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
        # A capture that fails leaves its own stream as the current one.
        unchanged = torch.cuda.stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), unchanged, torch.inference_mode():
            self._graphs = {num_tokens: self._capture(num_tokens) for num_tokens in SIZES}

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[ModelInput], num_tokens: int) -> Tensor:
        """(num_items, hidden_size), after the final norm. `num_tokens` is the result of `graph_size(inputs)`."""
        with torch.cuda.device(self.device):  # capture and replay must happen on the thread's current device
            captured = self._graphs[num_tokens]
            host = static_bytes(inputs, num_tokens).pin_memory()  # from pageable memory a copy would wait for the GPU
            captured.buffer.copy_(host, non_blocking=True)
            captured.graph.replay()
            return captured.rows[: len(inputs)].clone()

    def _capture(self, num_tokens: int) -> _CapturedGraph:
        buffer, batch = static_batch(num_tokens, self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # kernels are loaded and workspaces allocated before the capture
            for _ in range(3):
                self.language(batch, None, [])
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            rows = self.language(batch, None, [])
        return _CapturedGraph(graph, buffer, batch, rows)


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


def static_batch(num_tokens: int, device: torch.device) -> tuple[Tensor, PackedBatch]:
    """The bytes of the tensors that a graph reads, and a batch of views of them: 1 to `MAX_ITEMS` + 1 items."""
    sizes = _sizes(num_tokens)
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    input_ids, position_ids, pooled_index, cu_seqlens = torch.split(buffer, sizes)
    sequences = Sequences(cu_seqlens.view(torch.int32), num_tokens, ())
    pooled = Sequences(torch.arange(MAX_ITEMS + 2, dtype=torch.int32, device=device), 1, ())
    batch = PackedBatch(
        input_ids=input_ids.view(torch.int64),
        position_ids=position_ids.view(torch.int64).view(3, num_tokens),
        sequences=sequences,
        keys=sequences,
        prefixes=(),
        key_index=None,
        pooled_index=pooled_index.view(torch.int64),
        pooled=pooled,
        vision=None,
    )
    buffer.copy_(static_bytes([_filler(num_tokens)], num_tokens))
    return buffer, batch


def static_bytes(inputs: Sequence[ModelInput], num_tokens: int) -> Tensor:
    """The inputs as the bytes that a graph of `num_tokens` reads: one copy moves all of them.

    Items that are missing up to `MAX_ITEMS` + 1 are empty ones after the last token.
    """
    packed = pack(pad_to_size(inputs, num_tokens), 1, CPU)
    num_missing = MAX_ITEMS + 1 - len(packed.pooled_index)
    parts = (
        packed.input_ids,
        packed.position_ids,
        F.pad(packed.pooled_index, (0, num_missing)),
        F.pad(packed.sequences.cu_seqlens, (0, num_missing), value=num_tokens),
    )
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


def _sizes(num_tokens: int) -> list[int]:
    """The bytes of `input_ids`, `position_ids`, `pooled_index` (int64) and `cu_seqlens` (int32)."""
    return [8 * num_tokens, 3 * 8 * num_tokens, 8 * (MAX_ITEMS + 1), 4 * (MAX_ITEMS + 2)]
