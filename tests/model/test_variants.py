"""What a checkpoint folder can hold: the vectors are those of transformers, or one line names file and key.

transformers reads the same folder through `AutoTokenizer` and `Qwen3VLModel`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from embedder import Embedder
from embedder.errors import ModelUnavailable
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model import weights
from embedder.model.weights import load_model
from embedder.settings import Settings
from tests.conftest import picture
from tests.model.test_parity import assert_equal
from tests.oracle import Oracle

CPU = torch.device("cpu")
TEXTS = ("red", "  Cafe\u0301 <tool_call> \ufb01ne\n\nfoo <new> bar <image> Word", "a" * 200 + " b" * 120)
Change = Callable[[Path], None]


def edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the fields of one JSON file, or write it."""

    def apply(folder: Path) -> None:
        path = folder / file
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        change(fields)
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(fields), encoding="utf-8")

    return apply


def put(file: str, *keys: str, **fields: Any) -> Change:
    """Set fields of the object at `keys` of one JSON file."""

    def change(content: dict[str, Any]) -> None:
        for key in keys:
            content = content[key]
        content.update(fields)

    return edit(file, change)


def move(file: str, *keys: str, **names: str) -> Change:
    """Rename keys."""

    def change(content: dict[str, Any]) -> None:
        for key in keys:
            content = content[key]
        for old, new in names.items():
            content[new] = content.pop(old)

    return edit(file, change)


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def old_rope(fields: dict[str, Any]) -> None:
    rope = fields["text_config"].pop("rope_parameters")
    fields["text_config"]["rope_theta"] = rope.pop("rope_theta")
    fields["text_config"]["rope_scaling"] = rope


def rewrite(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Change the weights of `model.safetensors`."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = change(load_file(path))
        path.unlink()
        save_file({name: one.contiguous() for name, one in weights.items()}, path, metadata={"format": "pt"})

    return apply


def shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    split = split_torch_state_dict_into_shards(weights, max_shard_size="200KB")
    for name, names in split.filename_to_tensors.items():
        save_file({one: weights[one] for one in names}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}), encoding="utf-8"
    )


def copy_as(name: str) -> Change:
    """A second file with other weights, next to those that are read."""

    def apply(folder: Path) -> None:
        source = next(folder.glob("model*.safetensors"))
        save_file({one: weight + 1 for one, weight in load_file(source).items()}, folder / name)

    return apply


def added(content: str, **options: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **flags, **options}


def add_to_tokenizer(content: str, **options: Any) -> Change:
    def change(fields: dict[str, Any]) -> None:
        fields["added_tokens"].append(
            {"id": 1 + max(one["id"] for one in fields["added_tokens"]), **added(content, **options)}
        )

    return edit("tokenizer.json", change)


TRUNCATION = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
GENERIC = put("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
TOKENIZERS: dict[str, Change] = {
    "truncation": put("tokenizer.json", truncation=TRUNCATION),
    "padding": put("tokenizer.json", padding=PADDING),
    "both": put("tokenizer.json", truncation=TRUNCATION, padding=PADDING),
    "normalizer NFKC": put("tokenizer.json", normalizer={"type": "NFKC"}),
    "normalizer lower": put("tokenizer.json", normalizer={"type": "Lowercase"}),
    "no normalizer": put("tokenizer.json", normalizer=None),
    "no post-processor": put("tokenizer.json", post_processor=None),
    "byte-level post-processor": put(
        "tokenizer.json",
        post_processor={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ),
    "other pre-tokenizer": put(
        "tokenizer.json",
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ),
    "added token": add_to_tokenizer("<new>"),
    "added token that strips": add_to_tokenizer("<new>", lstrip=True, rstrip=True),
    "added token, whole word": add_to_tokenizer("foo", single_word=True, special=False),
    "added token, normalized": add_to_tokenizer("word", normalized=True, special=False),
    "model_max_length": put("tokenizer_config.json", model_max_length=16, truncation_side="left"),
    "padding_side": put("tokenizer_config.json", padding_side="left", pad_token="<|im_end|>"),
    "add_bos_token": put("tokenizer_config.json", add_bos_token=True, bos_token="<|im_start|>"),
    "add_eos_token": put("tokenizer_config.json", add_eos_token=True, eos_token="<|im_end|>"),
    "add_prefix_space": put("tokenizer_config.json", add_prefix_space=True),
    "extra special tokens": put("tokenizer_config.json", additional_special_tokens=["<image>"]),
    "extra_special_tokens": put("tokenizer_config.json", extra_special_tokens={"image": "<image>"}),
    "added_tokens_decoder": put("tokenizer_config.json", added_tokens_decoder={"1526": added("<image>")}),
    "added_tokens.json": put("added_tokens.json", **{"<image>": 1600}),
    "special_tokens_map": put("special_tokens_map.json", additional_special_tokens=["<image>"]),
    "generic class": GENERIC,
    "generic class, NFKC": both(
        put("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
        put("tokenizer.json", normalizer={"type": "NFKC"}),
    ),
    "no class": edit("tokenizer_config.json", lambda fields: fields.pop("tokenizer_class", None)),
    "split_special_tokens": put("tokenizer_config.json", split_special_tokens=True),
    "ignore_merges": put("tokenizer.json", "model", ignore_merges=True),
    "dropout": put("tokenizer.json", "model", dropout=0.5),
}


REFUSED = {  # and the key that the error names
    "normalizer NFKC": "normalizer",
    "normalizer lower": "normalizer",
    "no normalizer": "normalizer",
    "other pre-tokenizer": "pre_tokenizer",
    "ignore_merges": r"model\.ignore_merges",
    "dropout": r"model\.dropout",
    "add_prefix_space": "add_prefix_space",
    "extra special tokens": "additional_special_tokens",
    "extra_special_tokens": "extra_special_tokens",
    "added_tokens_decoder": "added_tokens_decoder",
    "special_tokens_map": "additional_special_tokens",
    "added_tokens.json": "<image>",
}


@pytest.fixture
def folder(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the random checkpoint."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_file_gives_the_ids_of_transformers_or_one_line(name: str, folder: Path) -> None:
    TOKENIZERS[name](folder)
    if name in REFUSED:
        with pytest.raises(ModelUnavailable, match=rf"json: {REFUSED[name]} (is|has) .*(allowed: |tokenizer\.json)"):
            load_tokenizer(folder)
        return
    settings = Settings()
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    Preprocessor(ours, read_vision_config(folder, settings), settings)
    ours.encode_special_tokens = False
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


# Configs and weights


def without_heads(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): one for name, one in weights.items() if name != "lm_head.weight"}


def with_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "lm_head.weight": weights["model.language_model.embed_tokens.weight"] + 1}


def with_more(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "audio.proj.weight": torch.ones(2, 2)}


def in_bfloat16(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.bfloat16() for name, one in weights.items()}


def without(key: str) -> Change:
    return edit("config.json", lambda fields: fields.pop(key))


SMALL, LARGE = 4096, 65_536
EQUAL: dict[str, Change] = {
    "torch_dtype": edit("config.json", lambda fields: fields.update(torch_dtype=fields.pop("dtype", "bfloat16"))),
    "both names of the dtype": put("config.json", torch_dtype="float16", dtype="bfloat16"),
    "rope_scaling": edit("config.json", old_rope),
    "both names of rope": put("config.json", "text_config", rope_scaling={"rope_type": "default"}, rope_theta=1e4),
    "generation config": put("generation_config.json", temperature=9, eos_token_id=1, max_length=3),
    "tied in the outer object": put("config.json", tie_word_embeddings=True),
    "head of its own": both(put("config.json", tie_word_embeddings=False), rewrite(with_head)),
    "head next to a tied one": rewrite(with_head),
    "trunk only": rewrite(without_heads),
    "weight that nothing uses": rewrite(with_more),
    "bfloat16 weights": rewrite(in_bfloat16),
    "sharded": shard,
    "consolidated next to single": copy_as("consolidated.safetensors"),
    "consolidated next to shards": both(shard, copy_as("consolidated.safetensors")),
    "older image limits": put("preprocessor_config.json", min_pixels=SMALL, max_pixels=LARGE),
    "newer image limits": put("preprocessor_config.json", size={"shortest_edge": SMALL, "longest_edge": LARGE}),
    "both image limits": put(
        "preprocessor_config.json", size={"shortest_edge": SMALL, "longest_edge": 2 * LARGE}, max_pixels=LARGE
    ),
    "feature extractor": put("preprocessor_config.json", feature_extractor_type="x"),
}
UNUSABLE: dict[str, tuple[Change, str]] = {
    "no text_config": (
        without("text_config"),
        r"config\.json: text_config: Field required$",
    ),
    "no vision_config": (
        without("vision_config"),
        r"config\.json: vision_config: Field required$",
    ),
    "wider": (
        put("config.json", "text_config", intermediate_size=999),
        r"gate_proj\.weight has the shape .*config",
    ),
    "deeper": (
        put("config.json", "text_config", num_hidden_layers=9),
        r"lack \d+ .* language_model\.layers",
    ),
    "other vocabulary": (put("config.json", "text_config", vocab_size=7), r"embed_tokens\.weight has the shape"),
    "vision": (put("config.json", "vision_config", hidden_size=128), r"visual\.\S+ has the shape"),
    "huge": (
        put("config.json", "text_config", hidden_size=2**20, intermediate_size=2**22, vocab_size=2**30),
        r"has the shape \[.*; config\.json describes \[",
    ),
    "index without its file": (both(shard, lambda folder: next(folder.glob("model-00002*")).unlink()), "no such file"),
    "index out of the folder": (
        both(shard, put("model.safetensors.index.json", "weight_map", x="../model.safetensors")),
        r"index\.json: weight_map names '\.\./model",
    ),
    "index without a map": (both(shard, move("model.safetensors.index.json", weight_map="map")), "weight_map"),
    "consolidated only": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        r"neither model\.safetensors nor .* \(found: consolidated\.safetensors\)",
    ),
}
ITEMS: list[dict[str, Any]] = [{"text": "red"}, {"image": picture(400, 300)}]


@pytest.mark.parametrize("name", EQUAL)
def test_folder_gives_the_vectors_of_transformers(name: str, folder: Path) -> None:
    EQUAL[name](folder)
    with Embedder(str(folder), device="cpu") as embedder:
        vectors = embedder.embed(ITEMS)
    assert_equal(vectors, Oracle(folder).embed(ITEMS))


@pytest.mark.parametrize("name", UNUSABLE)
def test_config_and_weights_that_do_not_match_are_one_line_before_anything_is_allocated(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = UNUSABLE[name]
    change(folder)
    monkeypatch.setattr(weights, "_read_weights", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ModelUnavailable, match=message) as caught:
        load_model(folder, torch.float32, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "warnings"), [(with_head, 0), (with_more, 1)])
def test_only_unused_weights_that_are_not_a_head_are_reported(
    change: Any, warnings: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(change)(folder)
    with caplog.at_level(logging.WARNING):
        load_model(folder, torch.float32, CPU)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{folder} has 1 weights that are not used, e.g. audio.proj.weight"] * warnings
