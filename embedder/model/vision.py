"""The vision tower: PackedPatches to visual tokens and DeepStack features, all images and clips packed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedder.inputs.processor_config import VisionConfig
from embedder.model.attention import Attention
from embedder.model.execution import by_rows, compile_if
from embedder.model.packing import PackedPatches
from embedder.model.positions import apply_rotary, interpolate_position_grid, vision_rotary
from embedder.model.products import add_product

Module = Any  # of `modules`, whose attributes torch leaves untyped

ROPE_THETA = 10_000.0  # of Qwen3VLVisionRotaryEmbedding in transformers


class Vision:
    """The vision tower of one checkpoint."""

    def __init__(self, tower: Module, config: VisionConfig, attention: Attention, *, is_compiled: bool = False) -> None:
        self.tower = tower
        self.attention = attention
        self.between_layers: Callable[[], None] = lambda: None  # may raise, to stop a forward pass
        self._query_key_value = compile_if(is_compiled, _query_key_value)
        self._output_and_mlp = compile_if(is_compiled, _output_and_mlp)
        self.num_heads: int = tower.config.num_heads
        self.deepstack_layers = list(tower.config.deepstack_visual_indexes)
        projection = tower.patch_embed.proj
        weight: Tensor = projection.weight  # (hidden_size, channels, frames, patch, patch)
        self.bias: Tensor = projection.bias
        self.video_weight = weight.flatten(1)
        # The model sees an image as two equal frames. Adding the weights of the two frames up gives the same product
        # with half of the FLOPs and half of the pixels to copy.
        self.image_weight = weight.float().sum(2).to(weight.dtype).flatten(1)
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        self.scale = (1 / (255 * std)).to(weight.device)  # (channels,)
        self.shift = (-mean / std).to(weight.device)

    def __call__(self, batch: PackedPatches) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens, and the features of each DeepStack layer; each (num_visual_tokens, language hidden_size)."""
        hidden_states = self._embed_patches(batch)
        head_dim = hidden_states.shape[1] // self.num_heads
        cos, sin = vision_rotary(batch.coordinates, head_dim, ROPE_THETA)
        deepstack = []
        for index, block in enumerate(self.tower.blocks):
            self.between_layers()
            hidden_states = self._block(block, hidden_states, cos, sin, batch)
            if index in self.deepstack_layers:
                merger = self.tower.deepstack_merger_list[self.deepstack_layers.index(index)]
                deepstack.append(merger(hidden_states))
        return self.tower.merger(hidden_states), deepstack

    def _block(self, block: Module, hidden_states: Tensor, cos: Tensor, sin: Tensor, batch: PackedPatches) -> Tensor:
        query, key, value = self._query_key_value(block, hidden_states, cos, sin)
        attended = self.attention(query, key, value, batch.sequences, batch.sequences, causal=False)
        return by_rows(partial(self._output_and_mlp, block), hidden_states, hidden_states, attended)

    def _embed_patches(self, batch: PackedPatches) -> Tensor:
        """Pixels to (num_patches, hidden_size), positions added. A matrix product replaces the module's Conv3d."""
        products = [
            F.linear(self._normalize(pixels), weight, self.bias)
            for pixels, weight in ((batch.image_pixels, self.image_weight), (batch.video_pixels, self.video_weight))
            if len(pixels)
        ]
        patches = products[0] if len(products) == 1 else torch.cat(products)
        positions = interpolate_position_grid(self.tower.pos_embed.weight, batch.coordinates, batch.grid_sizes)
        return patches + positions.to(patches.dtype)

    def _normalize(self, pixels: Tensor) -> Tensor:
        """(value / 255 - mean) / std of uint8 rows (channel first), computed in float32, in the weights' dtype."""
        values = pixels.view(len(pixels), len(self.scale), -1)
        return torch.addcmul(self.shift[:, None], values.float(), self.scale[:, None]).flatten(1).to(self.bias.dtype)


def _query_key_value(block: Module, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of every patch, each (num_patches, num_heads, head_dim); query and key are rotated."""
    num_patches, num_heads = len(hidden_states), block.attn.num_heads
    heads = block.attn.qkv(block.norm1(hidden_states)).view(num_patches, 3 * num_heads, -1)
    query_and_key = heads[:, : 2 * num_heads]
    rotated = by_rows(_rotated, query_and_key, query_and_key, cos, sin)
    return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, 2 * num_heads :]


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float32, as in transformers."""
    return apply_rotary(heads.float(), cos, sin).to(heads.dtype)


def _output_and_mlp(block: Module, hidden_states: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block after attention: output projection and MLP, each with its residual connection.

    Overwrites `hidden_states`.
    """
    hidden_states = add_product(hidden_states, block.attn.proj, attended.flatten(1))
    return add_product(hidden_states, block.mlp, block.norm2(hidden_states))
