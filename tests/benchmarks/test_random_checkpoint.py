"""Random checkpoints can be loaded by transformers, in every layout of real checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_checkpoint import SHAPES, build_tokenizer, main, shape_config, write_checkpoint
from tests.conftest import slow_except

from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLProcessor  # isort: skip

TEXTS = ["a red square on a green field", "Represent the user's input.", "system user assistant"]
SMALL_TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
SMALL_VISION = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "deepstack_visual_indexes": [0]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(TEXTS, vocab_size=400)


def write(folder: Path, tokenizer: Any, tied: bool = True, **options: Any) -> Path:
    config = shape_config("tiny", tokenizer, text=SMALL_TEXT, vision=SMALL_VISION, tie_word_embeddings=tied)
    write_checkpoint(folder, config, tokenizer, **options)
    return folder


def test_tokenizer_appends_endoftext_and_keeps_qwens_order(tokenizer: Any, tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(write(tmp_path, tokenizer))
    endoftext = loaded.convert_tokens_to_ids("<|endoftext|>")
    assert loaded("red").input_ids == [*loaded("red", add_special_tokens=False).input_ids, endoftext]
    assert loaded.convert_ids_to_tokens(endoftext + 12) == "<|image_pad|>"
    assert loaded.convert_ids_to_tokens(endoftext + 25) == "</think>"
    assert len(loaded) == endoftext + 26
    assert loaded.decode(loaded("Grün, 12 <|im_end|>\n", add_special_tokens=False).input_ids) == "Grün, 12 <|im_end|>\n"


@pytest.mark.parametrize("tied", slow_except([True, False], True))
@pytest.mark.parametrize("prefixed", slow_except([True, False], False))
def test_both_key_layouts_load_the_same_model(tokenizer: Any, tmp_path: Path, prefixed: bool, tied: bool) -> None:
    plain = Qwen3VLModel.from_pretrained(write(tmp_path / "plain", tokenizer, tied))
    folder = write(tmp_path / "other", tokenizer, tied, prefixed=prefixed)
    model, report = Qwen3VLModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in plain.state_dict().items())


def test_untied_checkpoint_carries_its_own_lm_head(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer, tied=False)
    model, report = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)


def test_every_bias_and_norm_weight_can_be_seen(tokenizer: Any, tmp_path: Path) -> None:
    model = Qwen3VLModel.from_pretrained(write(tmp_path, tokenizer))
    for name, weight in model.named_parameters():
        assert weight.std() > 0.01, name


def test_seed_decides_the_weights(tokenizer: Any, tmp_path: Path) -> None:
    files = [write(tmp_path / str(i), tokenizer, seed=seed) / "model.safetensors" for i, seed in enumerate((1, 1, 2))]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_processor_renders_parts_in_the_callers_order(tokenizer: Any, tmp_path: Path) -> None:
    processor = Qwen3VLProcessor.from_pretrained(write(tmp_path, tokenizer))
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>b<|im_end|>\n<|im_start|>assistant\n"
    )


def test_processor_config_can_be_left_out(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer, processor_config=False)
    assert not (folder / "preprocessor_config.json").exists()


def test_given_weights_replace_the_random_ones(tokenizer: Any, tmp_path: Path) -> None:
    trained = Qwen3VLModel.from_pretrained(write(tmp_path / "trained", tokenizer, seed=5)).state_dict()
    folder = write(tmp_path / "copy", tokenizer, state_dict=trained)
    copied = Qwen3VLModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(weight, copied[name]) for name, weight in trained.items())


@pytest.mark.parametrize(("shape", "num_parameters"), [("2b", 2_127_532_032), ("8b", 8_144_793_840)])
def test_big_shapes_have_the_published_number_of_parameters(tokenizer: Any, shape: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = Qwen3VLModel(shape_config(shape, tokenizer))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_command_writes_a_folder(tmp_path: Path) -> None:
    main(["tiny", str(tmp_path), "--seed", "3"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["text_config"]["hidden_size"] == SHAPES["tiny"]["text"]["hidden_size"]
