"""A fast forward pass for training, through the modules of a transformers Qwen3VLModel.

It computes the same values as `Qwen3VLModel.forward` with last-token pooling (tests/training/test_training.py), and is
several times faster in training on a CPU: all images of a batch have one size, so attention is one dense product; the
system prompt is computed once per batch; the last layer computes only the pooled token; attention is eager, because the
backward pass of the fused kernel is slow.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

PATCH = 16
MERGE = 2
TEMPORAL = 2


@dataclass(frozen=True)
class VisualFeatures:
    """The outputs of the vision tower that the language model uses, tokens in row order."""

    tokens: Tensor  # (num_items, num_tokens, hidden_size)
    deepstack: list[Tensor]  # each (num_items, num_tokens, hidden_size)

    def pooled(self) -> Tensor:
        """The mean over tokens of the summed outputs. The first stage trains the vision tower with it."""
        return torch.stack([self.tokens, *self.deepstack]).sum(0).mean(1)  # (num_items, hidden_size)


def patchify(frames: Tensor) -> Tensor:
    """Split (num_images, 3, height, width) into (num_images, num_patches, 768), in merge-block order."""
    num_images, channels, height, width = frames.shape
    rows, columns = height // PATCH // MERGE, width // PATCH // MERGE
    blocks = frames.reshape(num_images, channels, rows, MERGE, PATCH, columns, MERGE, PATCH)
    return blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(num_images, rows * columns * MERGE**2, -1)


def embed_patches(visual: nn.Module, first: Tensor, second: Tensor | None) -> Tensor:
    """Embed the patches of two frames. An image is the same frame twice, so the weights are summed."""
    weight = visual.patch_embed.proj.weight  # (hidden_size, 3, 2, 16, 16)
    bias = visual.patch_embed.proj.bias
    if second is None:
        return F.linear(first, weight.sum(2).flatten(1), bias)
    return F.linear(first, weight[:, :, 0].flatten(1), bias) + F.linear(second, weight[:, :, 1].flatten(1))


def see(model: Qwen3VLModel, frames: Tensor, next_frames: Tensor | None = None) -> VisualFeatures:
    """Run the vision tower. `frames`: (num_images, 3, height, width) in -1..1, sides multiples of 32.

    `next_frames`: the second frame of each pair of a clip.
    """
    visual = model.visual
    dtype = visual.patch_embed.proj.weight.dtype
    grid = torch.tensor([[1, frames.shape[2] // PATCH, frames.shape[3] // PATCH]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, visual.num_grid_per_side, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    second = None if next_frames is None else patchify(next_frames).to(dtype)
    hidden_states = embed_patches(visual, patchify(frames).to(dtype), second)  # (num_images, num_patches, hidden)
    hidden_states = hidden_states + (visual.pos_embed(indices) * weights[:, :, None].to(dtype)).sum(1)
    cos, sin = visual.rotary_pos_emb(hidden_states, get_vision_position_ids(grid, MERGE))
    cos, sin = cos.to(dtype), sin.to(dtype)
    deepstack = []
    for layer, block in enumerate(visual.blocks):
        hidden_states = _see_block(block, hidden_states, cos, sin)
        if layer in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(layer)]
            deepstack.append(_merge(merger, hidden_states))
    return VisualFeatures(_merge(visual.merger, hidden_states), deepstack)


def _merge(merger: nn.Module, hidden_states: Tensor) -> Tensor:
    return merger(hidden_states.flatten(0, 1)).unflatten(0, (hidden_states.shape[0], -1))


def _see_block(block: nn.Module, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    hidden_states = hidden_states + _see_attention(block.attn, block.norm1(hidden_states), cos, sin)
    return hidden_states + block.mlp(block.norm2(hidden_states))


def _see_attention(attention: nn.Module, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    num_images, num_patches, width = hidden_states.shape
    qkv = attention.qkv(hidden_states).view(num_images, num_patches, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (num_images, heads, num_patches, head_dim)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    weights = torch.softmax(query @ key.transpose(-1, -2) * attention.scaling, dim=-1)
    return attention.proj((weights @ value).transpose(1, 2).reshape(num_images, num_patches, width))


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the system prompt, one pair per layer, each (1, kv_heads, prefix_tokens, head_dim)."""

    keys_values: list[tuple[Tensor, Tensor]]
    num_tokens: int


def read_prefix(model: Qwen3VLModel, input_ids: Tensor) -> Prefix:
    """Keys and values of (prefix_tokens,) text ids. Causal attention makes them independent of later tokens."""
    language = model.language_model
    num_tokens = input_ids.shape[0]
    hidden_states = language.embed_tokens(input_ids)[None]
    cos, sin = language.rotary_emb(hidden_states, torch.arange(num_tokens).expand(3, 1, -1))
    keys_values: list[tuple[Tensor, Tensor]] = []
    for layer in language.layers:
        normed = layer.input_layernorm(hidden_states)
        keys_values.append(_keys_values(layer.self_attn, normed, cos, sin))
        hidden_states = _finish_layer(layer, hidden_states, normed, cos, sin, *keys_values[-1])
    return Prefix(keys_values, num_tokens)


def read(
    model: Qwen3VLModel,
    prefix: Prefix,
    input_ids: Tensor,
    lengths: Tensor,
    position_ids: Tensor,
    visual_at: Tensor | None = None,
    features: VisualFeatures | None = None,
) -> Tensor:
    """The hidden state of each item's last token after the final norm, (num_items, hidden_size) float32.

    `input_ids` (num_items, tokens) after the prefix, padded on the right; `lengths` (num_items,); `position_ids`
    (3, 1 or num_items, tokens); `visual_at` (visual_tokens,): the columns of `features`, the same for all items.
    """
    language = model.language_model
    hidden_states = language.embed_tokens(input_ids)
    if features is not None and visual_at is not None:
        hidden_states = hidden_states.index_copy(1, visual_at, features.tokens)
    cos, sin = language.rotary_emb(hidden_states, position_ids)
    num_layers = len(language.layers)
    last = (lengths - 1)[:, None, None]
    for index, layer in enumerate(language.layers):
        normed = layer.input_layernorm(hidden_states)
        key, value = _keys_values(layer.self_attn, normed, cos, sin)
        prefix_key, prefix_value = prefix.keys_values[index]
        num_items = hidden_states.shape[0]
        key = torch.cat((prefix_key.expand(num_items, -1, -1, -1), key), dim=2)
        value = torch.cat((prefix_value.expand(num_items, -1, -1, -1), value), dim=2)
        if index < num_layers - 1:
            hidden_states = _finish_layer(layer, hidden_states, normed, cos, sin, key, value)
            if features is not None and visual_at is not None and index < len(features.deepstack):
                hidden_states = hidden_states.index_add(1, visual_at, features.deepstack[index])
        else:
            query_at = prefix.num_tokens + lengths - 1
            hidden_states, normed = (
                states.gather(1, last.expand(-1, 1, states.shape[-1])) for states in (hidden_states, normed)
            )
            cos, sin = (
                angles.expand(num_items, -1, -1).gather(1, last.expand(-1, 1, angles.shape[-1]))
                for angles in (cos, sin)
            )
            hidden_states = _finish_layer(layer, hidden_states, normed, cos, sin, key, value, query_at)
    return language.norm(hidden_states)[:, 0].float()


def _keys_values(attention: nn.Module, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    heads = (*normed.shape[:-1], -1, attention.head_dim)
    key = attention.k_norm(attention.k_proj(normed).view(heads)).transpose(1, 2)
    value = attention.v_proj(normed).view(heads).transpose(1, 2)
    return rotate(key, cos[:, None], sin[:, None]), value


def _finish_layer(
    layer: nn.Module,
    hidden_states: Tensor,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    query_at: Tensor | None = None,
) -> Tensor:
    """Attention over `key` and `value`, then the MLP.

    The queries are the last tokens of the keys; with `query_at` (num_items,), one query per item at that position.
    """
    attention = layer.self_attn
    num_items, num_queries = normed.shape[:2]
    num_keys, kv_heads = key.shape[2], key.shape[1]
    query = attention.q_norm(attention.q_proj(normed).view(num_items, num_queries, -1, attention.head_dim))
    query = rotate(query.transpose(1, 2), cos[:, None], sin[:, None])
    grouped = query.reshape(num_items, kv_heads, -1, attention.head_dim)  # query heads grouped by kv head
    scores = (grouped @ key.transpose(-1, -2) * attention.scaling).view(num_items, -1, num_queries, num_keys)
    places = torch.arange(num_keys)
    if query_at is None:
        hidden = places > torch.arange(num_keys - num_queries, num_keys)[:, None]
    else:
        hidden = (places > query_at[:, None])[:, None, None]
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    mixed = weights.view(num_items, kv_heads, -1, num_keys) @ value
    mixed = mixed.view(num_items, -1, num_queries, attention.head_dim).transpose(1, 2).flatten(2)
    hidden_states = hidden_states + attention.o_proj(mixed)
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
