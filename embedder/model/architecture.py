"""The sizes of both towers in config.json, by the names and with the defaults of transformers' Qwen3VLConfig.

Fields that this package does not need are dropped. Some of them name things for transformers to fetch or import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from embedder.errors import ModelUnavailable
from embedder.inputs.items import json_value

Activation = Literal["gelu", "gelu_pytorch_tanh", "silu"]
DEFAULT_ROPE_THETA = 500_000.0  # of transformers' Qwen3VLTextConfig; published checkpoints have 5,000,000


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Rope(_Fields):
    """M-RoPE: the rotary frequencies, and how many pairs of them follow each axis (time, height, width)."""

    rope_type: Literal["default"] = "default"
    rope_theta: PositiveFloat = DEFAULT_ROPE_THETA
    mrope_section: list[int] = Field(default=[24, 20, 20], min_length=3, max_length=3)


class TextConfig(_Fields):
    """The language tower."""

    vocab_size: PositiveInt = 151_936
    hidden_size: PositiveInt = 4096
    intermediate_size: PositiveInt = 22_016
    num_hidden_layers: PositiveInt = 32
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt = 32
    head_dim: PositiveInt = 128
    hidden_act: Activation = "silu"
    rms_norm_eps: PositiveFloat = 1e-6
    attention_bias: bool = False
    rope_parameters: Rope = Rope()

    @model_validator(mode="before")
    @classmethod
    def _join_rope_fields(cls, fields: Any) -> Any:
        """Before transformers 5, `rope_parameters` was `rope_scaling`, and `rope_theta` stood next to it."""
        if not isinstance(fields, dict):
            return fields
        rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        if isinstance(rope, dict):
            outer = {"rope_theta": fields["rope_theta"]} if "rope_theta" in fields else {}
            rope_type = {"rope_type": rope["type"]} if "type" in rope else {}
            rope = {**outer, **rope_type, **rope}
        heads = fields.get("num_key_value_heads") or fields.get("num_attention_heads", 32)
        return {**fields, "rope_parameters": rope, "num_key_value_heads": heads}


class VisionTowerConfig(_Fields):
    """The vision tower. Its rotary angles have a fixed form and need no field."""

    depth: PositiveInt = 27
    hidden_size: PositiveInt = 1152
    hidden_act: Activation = "gelu_pytorch_tanh"
    intermediate_size: PositiveInt = 4304
    num_heads: PositiveInt = 16
    in_channels: PositiveInt = 3
    patch_size: PositiveInt = 16
    spatial_merge_size: PositiveInt = 2
    temporal_patch_size: PositiveInt = 2
    out_hidden_size: PositiveInt = 3584
    num_position_embeddings: PositiveInt = 2304
    deepstack_visual_indexes: list[int] = [8, 16, 24]


class Architecture(_Fields):
    """Both towers."""

    text_config: TextConfig
    vision_config: VisionTowerConfig
    tie_word_embeddings: bool = False
    quantization_config: None = None

    @field_validator("quantization_config", mode="before")
    @classmethod
    def _refuse_quantized_weights(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("quantized weights are not supported; allowed: float weights")
        return value


def read_architecture(folder: Path) -> Architecture:
    """From the config.json of a checkpoint folder. Raises `ModelUnavailable`, with the field."""
    path = folder / "config.json"
    try:
        return Architecture.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelUnavailable(f"cannot use {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        found = "" if first["type"] in ("missing", "json_invalid") else f" (found: {json_value(first['input']):.80})"
        raise ModelUnavailable(f"cannot use {path}: {field}: {first['msg']}{found}") from error
