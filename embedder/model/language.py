"""The language tower: PackedBatch and visual tokens to the final hidden state of each item's last token.

Causal attention saves work twice. The keys and values of a prefix do not depend on the tokens after it, so those of an
instruction, or of a query with its images, are computed once and cached. In the last layer only the pooled tokens need
a query, the MLP and the final norm; the others contribute keys and values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedder.model.attention import Attention
from embedder.model.eight_bit import EightBitLinear
from embedder.model.execution import CPU_ROWS, by_rows, compile_if
from embedder.model.int8_digits import DigitLinear
from embedder.model.onednn import PackedLinear, pad_rows
from embedder.model.packing import MAX_SHARED_TOKENS, PackedBatch, PackedPrefixes, PackedVision, Prefix
from embedder.model.positions import apply_rotary, interleaved_axes, rotary_frequencies, rotate_halves, text_rotary
from embedder.model.products import add_product

Module = Any  # of `modules`, whose attributes torch leaves untyped
KeyAndValue = tuple[Tensor, Tensor]  # each (tokens, num_kv_heads, head_dim), keys rotated
PrefixStates = Sequence[KeyAndValue | None]  # of each layer; None if the batch has no prefixes

MAX_CACHED_TOKENS = 4096  # of all cached prefixes together: 470 MB for the 2B, 600 MB for the 8B, in bfloat16


class Language:
    """The language tower of one checkpoint, and its prefix cache. `max_shared_tokens`: limit for a batch's prefixes."""

    def __init__(
        self,
        tower: Module,
        attention: Attention,
        *,
        is_compiled: bool = False,
        max_shared_tokens: int = MAX_SHARED_TOKENS,
    ) -> None:
        self.tower = tower
        self.attention = attention
        self.between_layers: Callable[[], None] = lambda: None  # may raise, to stop a forward pass
        rope, device = tower.config.rope_parameters, tower.norm.weight.device
        self._frequencies = rotary_frequencies(tower.config.head_dim, rope.rope_theta).to(device)
        self._axes = interleaved_axes(tower.config.head_dim, rope.mrope_section).to(device)
        self._query_key_value = compile_if(is_compiled, _query_key_value)
        self._output_and_mlp = compile_if(is_compiled, _output_and_mlp)
        self._is_by_rows = not _has_eight_bits(tower)  # weights of 8 bits may be converted for each product
        self._is_packed = isinstance(tower.layers[-1].mlp.down_proj, PackedLinear)
        self._max_shared_tokens = max_shared_tokens
        self._max_cached_tokens = max(MAX_CACHED_TOKENS, max_shared_tokens)
        self._prefix_cache: OrderedDict[Prefix, list[KeyAndValue]] = OrderedDict()  # one pair a layer; oldest use first

    @property
    def max_prefix_bytes(self) -> int:
        """Peak device memory of prefixes: the full cache, and those of one batch, both as cached and concatenated."""
        config, norm = self.tower.config, self.tower.layers[0].self_attn.k_norm.weight
        bytes_per_token = 2 * len(self.tower.layers) * config.num_key_value_heads * norm.numel() * norm.element_size()
        return int((self._max_cached_tokens + 2 * self._max_shared_tokens) * bytes_per_token)

    def __call__(
        self,
        batch: PackedBatch,
        visual_tokens: Tensor | None,
        deepstack: list[Tensor],
        prefixes: PrefixStates | None = None,
    ) -> Tensor:
        """(num_items, hidden_size), after the final norm.

        `visual_tokens`, and each of `deepstack` (one for each of the first layers): (num_visual_tokens, hidden_size).
        `prefixes`: the result of `cached_prefixes`, which is called if they are not given.
        """
        prefixes = prefixes or self.cached_prefixes(batch)
        hidden_states = self._embed(batch, visual_tokens)
        cos, sin = self._rotary(hidden_states, batch)
        if self._is_packed and len(hidden_states) <= CPU_ROWS:
            # Once here, instead of before each product. Attention does not write these rows, and nothing reads them.
            hidden_states, cos, sin = (pad_rows(one) for one in (hidden_states, cos, sin))
        *layers, last = self.tower.layers
        for index, layer in enumerate(layers):
            self.between_layers()
            hidden_states = self._layer(layer, hidden_states, cos, sin, batch, prefixes[index])
            _add_deepstack(hidden_states, batch.vision, deepstack, index)
        return _rms_norm(self.tower.norm, self._last_layer(last, hidden_states, cos, sin, batch, prefixes[-1]))

    def _layer(
        self,
        layer: Module,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: PackedBatch,
        prefix: KeyAndValue | None,
    ) -> Tensor:
        query, *own = self._query_key_value(layer, hidden_states, cos, sin)
        key, value = _prepend_prefix(prefix, own, batch)
        attended = self.attention(query, key, value, batch.sequences, batch.keys, causal=True)
        return self._finish_layer(layer, hidden_states, attended)

    def _finish_layer(self, layer: Module, hidden_states: Tensor, attended: Tensor) -> Tensor:
        """What follows attention. Overwrites `hidden_states`."""
        compute = partial(self._output_and_mlp, layer)
        if self._is_by_rows:
            return by_rows(compute, hidden_states, hidden_states, attended)
        output: Tensor = compute(hidden_states, attended)
        return output

    def _last_layer(
        self,
        layer: Module,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: PackedBatch,
        prefix: KeyAndValue | None,
    ) -> Tensor:
        """Keys and values of all tokens, the rest for the pooled tokens: (num_items, hidden_size), before the norm."""
        normed = _rms_norm(layer.input_layernorm, hidden_states)
        key, value = _prepend_prefix(prefix, _key_value(layer.self_attn, normed, cos, sin), batch)
        pooled = batch.pooled_index
        query = _query(layer.self_attn, normed[pooled], cos[pooled], sin[pooled])
        # Not causal: the pooled token is the last of its item and attends to all of its keys.
        attended = self.attention(query, key, value, batch.pooled, batch.keys, causal=False)
        return _output_and_mlp(layer, hidden_states[pooled], attended)

    def cached_prefixes(self, batch: PackedBatch) -> PrefixStates:
        """For each layer the keys and values of the batch's prefixes, concatenated; None if there are no prefixes.

        They must be in the cache: `compute_prefixes` puts the `missing_prefixes` there.
        """
        if not batch.prefixes:
            return [None] * len(self.tower.layers)
        for prefix in batch.prefixes:
            self._prefix_cache.move_to_end(prefix)
        prefixes = [self._prefix_cache[prefix] for prefix in batch.prefixes]
        while len(self._prefix_cache) > 1 and sum(map(len, self._prefix_cache)) > self._max_cached_tokens:
            self._prefix_cache.popitem(last=False)
        if len(prefixes) == 1:
            return prefixes[0]
        return [
            (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
            for layer in zip(*prefixes, strict=True)
        ]

    def missing_prefixes(self, batch: PackedBatch) -> list[Prefix]:
        """The batch's prefixes that are not in the cache."""
        return [prefix for prefix in batch.prefixes if prefix not in self._prefix_cache]

    def compute_prefixes(
        self,
        prefixes: Sequence[Prefix],
        batch: PackedPrefixes,
        visual_tokens: Tensor | None,
        deepstack: Sequence[Tensor],
    ) -> None:
        """Put the keys and values of each prefix, in every layer, into the cache. `batch` are the packed prefixes."""
        hidden_states = self._embed(batch, visual_tokens)
        cos, sin = self._rotary(hidden_states, batch)
        lengths = [len(prefix) for prefix in prefixes]
        *layers, last = self.tower.layers
        keys_and_values = []
        for index, layer in enumerate(layers):
            self.between_layers()
            query, key, value = self._query_key_value(layer, hidden_states, cos, sin)
            keys_and_values.append((key, value))
            attended = self.attention(query, key, value, batch.sequences, batch.sequences, causal=True)
            hidden_states = self._finish_layer(layer, hidden_states, attended)
            _add_deepstack(hidden_states, batch.vision, deepstack, index)
        keys_and_values.append(_key_value(last.self_attn, _rms_norm(last.input_layernorm, hidden_states), cos, sin))
        parts = [list(zip(key.split(lengths), value.split(lengths), strict=True)) for key, value in keys_and_values]
        # A view would keep the other prefixes, and the queries, in memory.
        for prefix, of_layers in zip(prefixes, zip(*parts, strict=True), strict=True):
            self._prefix_cache[prefix] = [(key.clone(), value.clone()) for key, value in of_layers]

    def _embed(self, batch: PackedBatch | PackedPrefixes, visual_tokens: Tensor | None) -> Tensor:
        """Token embeddings, with the visual tokens in their places: (total_tokens, hidden_size)."""
        hidden_states: Tensor = self.tower.embed_tokens(batch.input_ids)
        if batch.vision is not None and visual_tokens is not None:
            hidden_states[batch.vision.token_index] = visual_tokens.to(hidden_states.dtype)
        return hidden_states

    def _rotary(self, hidden_states: Tensor, batch: PackedBatch | PackedPrefixes) -> tuple[Tensor, Tensor]:
        """Cos and sin of the M-RoPE angles, each (total_tokens, head_dim)."""
        cos, sin = text_rotary(batch.position_ids, self._frequencies, self._axes)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def _has_eight_bits(tower: Module) -> bool:
    return any(isinstance(one, EightBitLinear | DigitLinear) for one in tower.modules())


def _add_deepstack(hidden_states: Tensor, vision: PackedVision | None, deepstack: Sequence[Tensor], layer: int) -> None:
    """Add the DeepStack features of a layer, if it has any, to its output at the visual tokens, in place."""
    if vision is not None and layer < len(deepstack):
        hidden_states.index_add_(0, vision.token_index, deepstack[layer].to(hidden_states.dtype))


def _query_key_value(layer: Module, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of every token, (tokens, num_heads or num_kv_heads, head_dim); query and key are rotated.

    The heads of all three are normalized together, without weights, although value needs no norm: the weights of query
    and key differ, and a part of the heads would have to be copied for the norm's kernel.
    """
    attention = layer.self_attn
    projected = attention.qkv_proj(_rms_norm(layer.input_layernorm, hidden_states))
    heads = projected.view(len(projected), -1, attention.head_dim)
    num_rotated = len(attention.qk_norm_weight)  # heads of query and key
    num_heads = 2 * num_rotated - heads.shape[1]
    if torch.compiler.is_compiling():
        rotated = _rotated_halves(attention, heads[:, :num_rotated], cos, sin)
    else:
        rotated = by_rows(partial(_rotated, attention), heads[:, :num_rotated], heads, cos, sin)
    return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_rotated:]


def _rotated(attention: Module, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and rotation of heads of query and key. `heads` includes those of value."""
    weight, epsilon = attention.qk_norm_weight, attention.q_norm.variance_epsilon
    if heads.device.type == "cpu" and heads.dtype != torch.float32:
        # In float32 from the norm to the rotation: takes less time than to convert in each operation, and rounds once.
        normed = _normalized(heads[:, : len(weight)].float(), weight.float(), epsilon)
        return apply_rotary(normed, cos.float(), sin.float()).to(heads.dtype)
    weighted = _normalized(heads, None, epsilon)[:, : len(weight)].mul_(weight)
    return apply_rotary(weighted, cos, sin)


def _rotated_halves(attention: Module, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and rotation of heads of query and key, for the compiler.

    Every value of a head has the same norm, so both halves, which rotate together, are computed at the same place: one
    kernel. A norm of the whole head would be a kernel by itself.
    """
    first, second = heads.float().chunk(2, -1)
    mean = (first.square() + second.square()).sum(-1, keepdim=True) / attention.head_dim
    scale = torch.rsqrt(mean + attention.q_norm.variance_epsilon)
    first_weight, second_weight = attention.qk_norm_weight.chunk(2, -1)
    halves = rotate_halves(first * scale * first_weight, second * scale * second_weight, cos, sin)
    return torch.cat([half.to(heads.dtype) for half in halves], -1)


def _query(attention: Module, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = attention.q_proj(normed).view(len(normed), -1, attention.head_dim)
    return apply_rotary(_rms_norm(attention.q_norm, heads), cos, sin)


def _key_value(attention: Module, normed: Tensor, cos: Tensor, sin: Tensor) -> KeyAndValue:
    key, value = attention.kv_proj(normed).view(len(normed), 2, -1, attention.head_dim).unbind(1)
    return apply_rotary(_rms_norm(attention.k_norm, key), cos, sin), value


def _output_and_mlp(layer: Module, hidden_states: Tensor, attended: Tensor) -> Tensor:
    """The rest of a layer after attention: output projection and MLP, each with its residual connection.

    Overwrites `hidden_states`.
    """
    hidden_states = add_product(hidden_states, layer.self_attn.o_proj, attended.flatten(1))
    gate, up = layer.mlp.gate_up_proj(_rms_norm(layer.post_attention_layernorm, hidden_states)).chunk(2, -1)
    return add_product(hidden_states, layer.mlp.down_proj, layer.mlp.act_fn(gate).mul_(up))


def _rms_norm(norm: Module, states: Tensor) -> Tensor:
    """What transformers' RMSNorm module computes, in fewer operations.

    In bfloat16 on CUDA the fused kernel rounds once, the module twice.
    """
    return _normalized(states, norm.weight, norm.variance_epsilon)


def _normalized(states: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """`F.rms_norm` over the last dimension. On a CPU, torch's takes two more passes over all values."""
    if states.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(states, states.shape[-1:], weight, epsilon)
    wide = states.float()  # in 16 bits, each operation would convert
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.mul_(length).div_(_constant(states.shape[-1])).add_(_constant(epsilon)).rsqrt_()
    normed = wide * scale if wide is states else wide.mul_(scale)
    return (normed if weight is None else normed.mul_(weight)).to(states.dtype)


@cache
def _constant(value: float) -> Tensor:
    """A number as a float32 tensor on a CPU. A Python number would be converted again in each operation."""
    return torch.tensor(float(value))


def _prepend_prefix(prefix: KeyAndValue | None, own: Sequence[Tensor], batch: PackedBatch) -> KeyAndValue:
    """Each item's own keys and values after those of its prefix: (total_keys, num_kv_heads, head_dim)."""
    if prefix is None or batch.key_index is None:
        key, value = own
        return key, value
    key, value = (torch.cat(pair) for pair in zip(prefix, own, strict=True))
    if len(batch.pooled_index) == 1:  # one item: its prefix, then its own tokens
        return key, value
    return key.index_select(0, batch.key_index), value.index_select(0, batch.key_index)
