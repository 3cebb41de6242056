"""Reference values of the benchmarks: the rates of a matrix product and of a copy, and the FLOPs of items."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from embedder.engine.device import WaitForRows
from embedder.inputs.preprocess import ModelInput
from embedder.model.onednn import PackedLinear
from embedder.model.products import can_pack
from embedder.models import Models

_ROW = np.random.default_rng(0).standard_normal(8192, np.float32)


def no_model(models: Models, inputs: list[ModelInput]) -> WaitForRows:
    """Replaces `Models._launch`: returns the same row for each input and computes nothing."""
    assert models.embedder is not None
    hidden_size = models.embedder.forward.hidden_size
    rows = np.broadcast_to(_ROW[:hidden_size], (len(inputs), hidden_size))
    return lambda: rows


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product of random values; the median of 5 after a warm-up.

    On a CPU, of the faster one of torch's product and oneDNN's with packed weights.
    """
    size = 8192 if device.type == "cuda" else 2048
    layer = torch.nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    states = torch.randn(size, size, device=device).to(dtype)
    products = [layer, PackedLinear(layer)] if can_pack(layer.weight) else [layer]
    return 2 * size**3 / min(_median_s(partial(product, states), device) for product in products)


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes/s of a large copy on the device, read and written bytes together."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_s(lambda: target.copy_(source), device)


def _median_s(run: Any, device: torch.device) -> float:
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


@dataclass(frozen=True)
class Weights:
    """Parameters multiplied for each token, patch and visual token. Embedding tables do not count.

    `per_pair`, `per_patch_pair`: multiplications of attention for two tokens, or patches, of which one attends to the
    other.
    """

    per_token: int
    per_patch: int
    per_visual_token: int
    per_pair: int
    per_patch_pair: int

    @classmethod
    def of(cls, model: Any) -> Weights:
        """From transformers' Qwen3VLModel, which may be on the meta device."""
        vision = model.visual
        text_config, vision_config = model.config.text_config, model.config.vision_config
        width = text_config.num_attention_heads * text_config.head_dim
        return cls(
            per_token=_count(model.language_model) - _count(model.language_model.embed_tokens),
            per_patch=_count(vision.blocks) + _count(vision.patch_embed),
            per_visual_token=_count(vision.merger) + _count(vision.deepstack_merger_list),
            per_pair=2 * text_config.num_hidden_layers * width,
            per_patch_pair=2 * vision_config.depth * vision_config.hidden_size,
        )

    def flops(self, inputs: Sequence[ModelInput]) -> float:
        """2 * parameters * tokens, with all tokens of every prompt.

        Attention's own products are left out: see `attention_flops`.
        """
        num_patches = sum(len(patches.pixels) for one in inputs for patches in one.patches)
        num_tokens = sum(one.num_tokens for one in inputs)
        num_visual_tokens = sum(len(one.visual_index) for one in inputs)
        work = num_tokens * self.per_token + num_patches * self.per_patch + num_visual_tokens * self.per_visual_token
        return 2.0 * work

    def attention_flops(self, inputs: Sequence[ModelInput]) -> float:
        """Of the products of queries and keys, and of weights and values: each token attends to those before it, and
        each patch to those of its image or frame.
        """
        pairs = sum(one.num_tokens * (one.num_tokens + 1) // 2 for one in inputs)
        grids = [patches.grid_thw for one in inputs for patches in one.patches]
        patch_pairs = sum(num_frames * (height * width) ** 2 for num_frames, height, width in grids)
        return 2.0 * (pairs * self.per_pair + patch_pairs * self.per_patch_pair)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
