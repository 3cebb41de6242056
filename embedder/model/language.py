"""PackedBatch and visual tokens -> the state of each item's last token: the language tower, packed.

The last layer computes keys and values of all tokens but queries, MLP and norm only of the pooled ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from embedder.model.attention import Attention
from embedder.model.positions import apply_rotary
from embedder.packing import PackedBatch

Module = Any  # transformers' modules, whose attributes torch leaves untyped


class Language:
    """The tower of one checkpoint."""

    def __init__(self, tower: Module, attention: Attention) -> None:
        self.tower = tower
        self.attention = attention
        self.head_dim: int = tower.layers[0].self_attn.head_dim

    def __call__(self, batch: PackedBatch, visual_tokens: Tensor | None, deepstack: list[Tensor]) -> Tensor:
        """(num_items, hidden_size), after the final norm."""
        hidden_states: Tensor = self.tower.embed_tokens(batch.input_ids)  # (total_tokens, hidden_size)
        if batch.vision is not None and visual_tokens is not None:
            hidden_states[batch.vision.token_index] = visual_tokens.to(hidden_states.dtype)
        cos, sin = self.tower.rotary_emb(hidden_states, batch.position_ids[:, None])
        cos, sin = cos[0], sin[0]  # (total_tokens, head_dim)
        *layers, last = self.tower.layers
        for index, layer in enumerate(layers):
            hidden_states = self._layer(layer, hidden_states, cos, sin, batch)
            if batch.vision is not None and index < len(deepstack):
                hidden_states.index_add_(0, batch.vision.token_index, deepstack[index].to(hidden_states.dtype))
        normed: Tensor = self.tower.norm(self._last_layer(last, hidden_states, cos, sin, batch))
        return normed

    def _layer(self, layer: Module, hidden_states: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        query = self._query(layer.self_attn, normed, cos, sin)
        key, value = self._key_value(layer.self_attn, normed, cos, sin)
        attended = self.attention(query, key, value, batch.sequences, batch.sequences, causal=True)
        return self._finish(layer, hidden_states, attended)

    def _last_layer(self, layer: Module, hidden_states: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        key, value = self._key_value(layer.self_attn, normed, cos, sin)
        pooled = batch.pooled_index
        query = self._query(layer.self_attn, normed[pooled], cos[pooled], sin[pooled])
        attended = self.attention(query, key, value, batch.pooled, batch.sequences, causal=False)  # it is the last one
        return self._finish(layer, hidden_states[pooled], attended)

    def _query(self, attention: Module, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = attention.q_proj(normed).view(len(normed), -1, self.head_dim)
        return apply_rotary(attention.q_norm(heads), cos, sin)

    def _key_value(self, attention: Module, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key = attention.k_proj(normed).view(len(normed), -1, self.head_dim)
        value: Tensor = attention.v_proj(normed).view(len(normed), -1, self.head_dim)
        return apply_rotary(attention.k_norm(key), cos, sin), value

    def _finish(self, layer: Module, hidden_states: Tensor, attended: Tensor) -> Tensor:
        hidden_states = hidden_states + layer.self_attn.o_proj(attended.flatten(1))
        finished: Tensor = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        return finished
