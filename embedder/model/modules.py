"""The layers of Qwen3-VL's two towers, by the names that their weights have in a checkpoint.

They hold weights; `Vision` and `Language` compute with them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedder.model.architecture import Activation, Architecture, TextConfig, VisionTowerConfig
from embedder.model.onednn import activated_product

LAYER_NORM_EPS = 1e-6  # of the vision tower; config.json does not state it


class Towers(nn.Module):
    """Both towers of a checkpoint, without a head."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision_config)
        self.language_model = LanguageTower(config.text_config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.language_model.norm.weight.dtype


class VisionTower(nn.Module):
    """Patches to visual tokens."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, config.hidden_size)
        merged_size = config.hidden_size * config.spatial_merge_size**2
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, merged_size) for _ in config.deepstack_visual_indexes
        )


class PatchEmbedding(nn.Module):
    """The projection of a patch's pixels."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)


class VisionBlock(nn.Module):
    """One layer of the vision tower."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)


class VisionAttention(nn.Module):
    """The projections of one layer's attention."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)


class VisionMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = activation(config.hidden_act)

    def forward(self, states: Tensor) -> Tensor:
        """(num_patches, hidden_size) to the same shape."""
        output: Tensor = self.linear_fc2(activated_product(self.linear_fc1, self.act_fn, states))
        return output


class PatchMerger(nn.Module):
    """The patches of a square to one visual token. `norm_size`: one patch or, for DeepStack, the whole square."""

    def __init__(self, config: VisionTowerConfig, norm_size: int) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm = nn.LayerNorm(norm_size, eps=LAYER_NORM_EPS)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.act_fn = nn.GELU()
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """(num_patches, hidden_size) to (num_visual_tokens, out_hidden_size)."""
        merged = self.norm(states.view(-1, *self.norm.normalized_shape)).view(-1, self.merged_size)
        output: Tensor = self.linear_fc2(activated_product(self.linear_fc1, self.act_fn, merged))
        return output


class LanguageTower(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LanguageLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageLayer(nn.Module):
    """One layer of the language tower."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = LanguageAttention(config)
        self.mlp = LanguageMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageAttention(nn.Module):
    """The projections of one layer's attention, and the norms of its queries and keys."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)


class LanguageMLP(nn.Module):
    """A gated MLP."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = activation(config.hidden_act)


class RMSNorm(nn.Module):
    """The weight of a norm; `language._rms_norm` computes it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.variance_epsilon = eps


def embedding(num_rows: int, size: int) -> nn.Embedding:
    """A table without random numbers, for which torch would import its compiler: 1.7 s."""
    return nn.Embedding(num_rows, size, _weight=torch.empty(num_rows, size), _freeze=True)


def activation(name: Activation) -> nn.Module:
    """By its name in config.json."""
    if name == "silu":
        return nn.SiLU()
    return nn.GELU(approximate="tanh" if name == "gelu_pytorch_tanh" else "none")
