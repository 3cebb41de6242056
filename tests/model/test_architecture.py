"""config.json: its fields, their defaults, and one line for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

from embedder.errors import ModelUnavailable
from embedder.model.architecture import Architecture, TextConfig, VisionTowerConfig, read_architecture


def read(folder: Path, text: Any = None, vision: Any = None, **fields: Any) -> Architecture:
    content = {"text_config": text or {}, "vision_config": vision or {}, **fields}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return read_architecture(folder)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(TextConfig, Qwen3VLTextConfig), (VisionTowerConfig, Qwen3VLVisionConfig)]
)
def test_field_that_config_json_lacks_is_transformers(ours: Any, theirs: Any) -> None:
    expected = theirs()
    for name, value in ours().model_dump(exclude={"rope_parameters"}).items():
        default = getattr(expected, name)
        assert value == (list(default) if isinstance(default, tuple) else default), name


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 7.0},
    {"rope_parameters": {"rope_theta": 5, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0},
    {"rope_parameters": {"mrope_section": [2, 1, 1]}, "rope_theta": 7.0},
    {"rope_scaling": {"mrope_section": [2, 1, 1], "type": "default"}, "rope_theta": 7.0},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 5.0}},
    {"rope_scaling": None, "rope_parameters": {"rope_theta": 5.0}},
]


@pytest.mark.parametrize("fields", ROPES, ids=str)
def test_rope_of_any_version_is_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    expected = Qwen3VLTextConfig(**json.loads(json.dumps(fields))).rope_parameters
    rope = read(tmp_path, fields).text_config.rope_parameters
    assert (rope.rope_theta, rope.rope_type) == (expected["rope_theta"], expected["rope_type"])
    assert rope.mrope_section == expected.get("mrope_section", [24, 20, 20])


def test_heads_of_keys_are_those_of_queries_if_null(tmp_path: Path) -> None:
    config = read(tmp_path, {"num_key_value_heads": None, "num_attention_heads": 6}).text_config
    assert config.num_key_value_heads == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": {"hidden_size": "4096"}}, r"text_config\.hidden_size: .* valid integer \(found: '4096'\)"),
        ({"text": {"hidden_size": 0}}, r"text_config\.hidden_size: .* greater than 0 \(found: 0\)"),
        ({"text": {"head_dim": None}}, r"text_config\.head_dim: .* valid integer \(found: null\)"),
        ({"text": {"hidden_act": "relu"}}, r"text_config\.hidden_act: .*'silu' \(found: 'relu'\)"),
        ({"text": {"rope_scaling": {"rope_type": "yarn"}}}, r"rope_type: .*'default' \(found: 'yarn'\)"),
        ({"text": {"rope_scaling": {"type": "mrope"}}}, r"rope_type: .*'default' \(found: 'mrope'\)"),
        ({"text": {"rope_parameters": "default"}}, r"text_config\.rope_parameters: "),
        ({"text": {"rope_parameters": {"mrope_section": [8, 8]}}}, r"mrope_section: .* at least 3 items"),
        ({"text": ["a"]}, r"text_config: .*object"),
        ({"vision": {"deepstack_visual_indexes": [1, "2"]}}, r"deepstack_visual_indexes\.1: .* \(found: '2'\)"),
        ({"vision": {"patch_size": [16, 16]}}, r"vision_config\.patch_size: .* integer"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config: .*quantized weights are not supported",
        ),
    ],
    ids=str,
)
def test_field_that_cannot_be_used_is_one_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=rf"^cannot use \S+config\.json: .*{message}") as caught:
        read(tmp_path, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"text_config": {}}'])
def test_file_that_is_no_config_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelUnavailable, match=r"^cannot use \S+config\.json: ") as caught:
        read_architecture(tmp_path)
    assert "\n" not in str(caught.value)
