"""PackedBatch and visual tokens -> the state of each item's last token: the language tower, packed.

Under causal attention the keys and values of a prefix do not depend on what follows it, so those of an instruction are
computed once and kept. The last layer computes keys and values of all tokens but queries, MLP and norm only of the
pooled ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedder.model.attention import Attention
from embedder.model.compile import Fuse, uncompiled
from embedder.model.packing import MAX_SHARED_TOKENS, PackedBatch, PackedPrefixes, pack_prefixes
from embedder.model.positions import apply_rotary

Module = Any  # transformers' modules, whose attributes torch leaves untyped
Prefix = tuple[int, ...]
KeyValue = tuple[Tensor, Tensor]  # each (tokens, num_kv_heads, head_dim), keys rotated

MAX_KEPT_TOKENS = 4096  # of all kept prefixes together: 470 MB for the 2B, 600 MB for the 8B, in bfloat16


class Language:
    """The tower of one checkpoint, and the prefixes it has seen."""

    def __init__(self, tower: Module, attention: Attention, fuse: Fuse = uncompiled) -> None:
        self.tower = tower
        self.attention = attention
        self._project, self._finish = (
            fuse(_project),
            fuse(_finish),
        )  # of whole layers: all but the last one's pooled rows
        self._kept: OrderedDict[Prefix, list[KeyValue]] = OrderedDict()  # by layer; least recently used first

    @property
    def max_kept_bytes(self) -> int:
        """Device memory that the prefixes will take: those kept, and those of one batch, twice, before others go."""
        projection = self.tower.layers[0].self_attn.k_proj.weight
        num_tokens = MAX_KEPT_TOKENS + 2 * MAX_SHARED_TOKENS
        return int(2 * num_tokens * len(self.tower.layers) * projection.shape[0] * projection.element_size())

    def __call__(self, batch: PackedBatch, visual_tokens: Tensor | None, deepstack: list[Tensor]) -> Tensor:
        """(num_items, hidden_size), after the final norm."""
        prefixes = self._prefix_key_values(batch)
        hidden_states: Tensor = self.tower.embed_tokens(batch.input_ids)  # (total_tokens, hidden_size)
        if batch.vision is not None and visual_tokens is not None:
            hidden_states[batch.vision.token_index] = visual_tokens.to(hidden_states.dtype)
        cos, sin = self._rotary(hidden_states, batch)
        *layers, last = self.tower.layers
        for index, layer in enumerate(layers):
            hidden_states = self._layer(layer, hidden_states, cos, sin, batch, prefixes[index])
            if batch.vision is not None and index < len(deepstack):
                hidden_states.index_add_(0, batch.vision.token_index, deepstack[index].to(hidden_states.dtype))
        return _normalize(self.tower.norm, self._last_layer(last, hidden_states, cos, sin, batch, prefixes[-1]))

    def _layer(
        self,
        layer: Module,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: PackedBatch,
        prefix: KeyValue | None,
    ) -> Tensor:
        query, *own = self._project(layer, hidden_states, cos, sin)
        key, value = _behind(prefix, own, batch)
        attended = self.attention(query, key, value, batch.sequences, batch.keys, causal=True)
        finished: Tensor = self._finish(layer, hidden_states, attended)
        return finished

    def _last_layer(
        self,
        layer: Module,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: PackedBatch,
        prefix: KeyValue | None,
    ) -> Tensor:
        normed = _normalize(layer.input_layernorm, hidden_states)
        key, value = _behind(prefix, _key_value(layer.self_attn, normed, cos, sin), batch)
        pooled = batch.pooled_index
        query = _query(layer.self_attn, normed[pooled], cos[pooled], sin[pooled])
        attended = self.attention(query, key, value, batch.pooled, batch.keys, causal=False)  # it is the last one
        return _finish(layer, hidden_states[pooled], attended)

    def _prefix_key_values(self, batch: PackedBatch) -> list[KeyValue] | list[None]:
        """Keys and values of the batch's prefixes, one behind the other, for each layer; None without prefixes."""
        if not batch.prefixes:
            return [None] * len(self.tower.layers)
        missing = [prefix for prefix in batch.prefixes if prefix not in self._kept]
        if missing:
            self._kept.update(zip(missing, self._compute_prefixes(missing, batch.input_ids.device), strict=True))
        for prefix in batch.prefixes:
            self._kept.move_to_end(prefix)
        of_batch = [self._kept[prefix] for prefix in batch.prefixes]
        while len(self._kept) > 1 and sum(map(len, self._kept)) > MAX_KEPT_TOKENS:
            self._kept.popitem(last=False)
        if len(of_batch) == 1:
            return of_batch[0]
        return [
            (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
            for layer in zip(*of_batch, strict=True)
        ]

    def _compute_prefixes(self, prefixes: list[Prefix], device: torch.device) -> list[list[KeyValue]]:
        """For each prefix its keys and values, by layer."""
        batch = pack_prefixes(prefixes, device)
        hidden_states: Tensor = self.tower.embed_tokens(batch.input_ids)
        cos, sin = self._rotary(hidden_states, batch)
        lengths = [len(prefix) for prefix in prefixes]
        by_layer = []
        for layer in self.tower.layers:
            query, key, value = self._project(layer, hidden_states, cos, sin)
            parts = zip(torch.split(key, lengths), torch.split(value, lengths), strict=True)
            by_layer.append([(one.clone(), other.clone()) for one, other in parts])  # a view would keep its neighbors
            if layer is not self.tower.layers[-1]:
                attended = self.attention(query, key, value, batch.sequences, batch.sequences, causal=True)
                hidden_states = self._finish(layer, hidden_states, attended)
        return [list(of_prefix) for of_prefix in zip(*by_layer, strict=True)]

    def _rotary(self, hidden_states: Tensor, batch: PackedBatch | PackedPrefixes) -> tuple[Tensor, Tensor]:
        """Cos and sin of the M-RoPE angles, each (total_tokens, head_dim)."""
        cos, sin = self.tower.rotary_emb(hidden_states, batch.position_ids[:, None])
        return cos[0], sin[0]


def _project(layer: Module, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of every token: (tokens, heads, head_dim), the first two rotated."""
    normed = _normalize(layer.input_layernorm, hidden_states)
    return _query(layer.self_attn, normed, cos, sin), *_key_value(layer.self_attn, normed, cos, sin)


def _query(attention: Module, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = attention.q_proj(normed).view(len(normed), -1, attention.head_dim)
    return apply_rotary(_normalize(attention.q_norm, heads), cos, sin)


def _key_value(attention: Module, normed: Tensor, cos: Tensor, sin: Tensor) -> KeyValue:
    key = attention.k_proj(normed).view(len(normed), -1, attention.head_dim)
    value: Tensor = attention.v_proj(normed).view(len(normed), -1, attention.head_dim)
    return apply_rotary(_normalize(attention.k_norm, key), cos, sin), value


def _finish(layer: Module, hidden_states: Tensor, attended: Tensor) -> Tensor:
    """Behind the attention: its projection, and the MLP."""
    hidden_states = hidden_states + layer.self_attn.o_proj(attended.flatten(1))
    finished: Tensor = hidden_states + layer.mlp(_normalize(layer.post_attention_layernorm, hidden_states))
    return finished


def _normalize(norm: Module, states: Tensor) -> Tensor:
    """What transformers' RMSNorm module computes, bit for bit, in one operation instead of six."""
    return F.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _behind(prefix: KeyValue | None, own: Sequence[Tensor], batch: PackedBatch) -> KeyValue:
    """Own keys and values, each item's behind those of its prefix: (total_keys, num_kv_heads, head_dim)."""
    if prefix is None or batch.key_index is None:
        key, value = own
        return key, value
    key, value = (torch.cat(pair).index_select(0, batch.key_index) for pair in zip(prefix, own, strict=True))
    return key, value
