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

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from embedder import Embedder
from embedder.errors import ModelUnavailable
from embedder.inputs.chat_template import check_chat_template
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model import weights
from embedder.model.weights import load_model
from embedder.settings import Settings
from tests.conftest import picture, slow_except
from tests.inputs.test_video import clip
from tests.model.test_parity import assert_equal
from tests.oracle import Oracle, ProcessorOracle

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


# Processor files and chat templates

IMAGES, VIDEOS, PROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
LIMITS = {"shortest_edge": 40_960, "longest_edge": 50_000}
OLDER_LIMITS = {"min_pixels": 40_960, "max_pixels": 50_000}


def drop(file: str, key: str) -> Change:
    return edit(file, lambda fields: fields.pop(key))


def nest(images: dict[str, Any], videos: dict[str, Any]) -> Change:
    """Both files as objects of one, as transformers 5 saves them."""

    def apply(folder: Path) -> None:
        parts = {
            "image_processor": json.loads((folder / IMAGES).read_text(encoding="utf-8")) | images,
            "video_processor": json.loads((folder / VIDEOS).read_text(encoding="utf-8")) | videos,
        }
        (folder / PROCESSOR).write_text(json.dumps({"processor_class": "Qwen3VLProcessor", **parts}), encoding="utf-8")

    return apply


def remove(*names: str) -> Change:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


PROCESSORS: dict[str, Change] = {
    "image: older limits": put(IMAGES, **OLDER_LIMITS),
    "image: newer limits": put(IMAGES, size=LIMITS),
    "image: both limits": put(IMAGES, size={**LIMITS, "longest_edge": 60_000}, max_pixels=50_000),
    "image: older limits only": both(drop(IMAGES, "size"), put(IMAGES, max_pixels=50_000)),
    "image: one size": put(IMAGES, size={"shortest_edge": 50_176, "longest_edge": 50_176}),
    "image: size null": put(IMAGES, size=None),
    "image: older limit null": put(IMAGES, min_pixels=None),
    "image: fast class": put(IMAGES, image_processor_type="Qwen2VLImageProcessorFast"),
    "image: no class": drop(IMAGES, "image_processor_type"),
    "image: crop": put(IMAGES, do_center_crop=True, crop_size={"height": 32, "width": 32}),
    "image: pad": put(IMAGES, do_pad=True, pad_size={"height": 512, "width": 512}),
    "image: not to RGB": put(IMAGES, do_convert_rgb=False),
    "video: older limits": put(VIDEOS, **OLDER_LIMITS),
    "video: older limits only": both(drop(VIDEOS, "size"), put(VIDEOS, **OLDER_LIMITS)),
    "video: newer limits": put(VIDEOS, size=LIMITS),
    "video: 9 frames above the limit": put(VIDEOS, size={"shortest_edge": 4096, "longest_edge": 20_000}),
    "video: no limits": drop(VIDEOS, "size"),
    "video: rate": put(VIDEOS, fps=0.5),
    "video: fewest frames": put(VIDEOS, min_frames=9),
    "video: most frames": put(VIDEOS, max_frames=7),
    "video: fewest above most": put(VIDEOS, min_frames=9, max_frames=7),
    "video: capped frames": put(VIDEOS, cap_pixels_per_frame=True, max_video_tokens=16),
    "video: capped by the total": put(VIDEOS, cap_pixels_per_frame=True, size={**LIMITS, "longest_edge": 300_000}),
    "video: cap null": put(VIDEOS, cap_pixels_per_frame=None),
    "video: no class": drop(VIDEOS, "video_processor_type"),
    "video: crop and pad": put(VIDEOS, do_center_crop=True, crop_size={"height": 32, "width": 32}, do_pad=True),
    "video: rounded factor": put(VIDEOS, rescale_factor=0.00392156862745098),
    "video: empty file": edit(VIDEOS, lambda fields: fields.clear()),
    "both: mean": both(put(IMAGES, image_mean=[0.1, 0.2, 0.3]), put(VIDEOS, image_mean=[0.1, 0.2, 0.3])),
    "nested": both(nest({}, {}), remove(IMAGES, VIDEOS)),
    "nested, newer names": both(nest({"size": LIMITS}, {"size": LIMITS, "fps": 1}), remove(IMAGES, VIDEOS)),
    "nested, older names": both(nest(OLDER_LIMITS, OLDER_LIMITS), remove(IMAGES, VIDEOS)),
    "nested next to other files": both(
        nest({"size": LIMITS}, {"size": LIMITS}), put(IMAGES, size={**LIMITS, "shortest_edge": 4096}), remove(VIDEOS)
    ),
    "nested images only": both(nest({"size": LIMITS}, {"size": LIMITS}), drop(PROCESSOR, "video_processor")),
    "nested videos only": both(nest({"size": LIMITS}, {"size": LIMITS}), drop(PROCESSOR, "image_processor")),
    "nested null": both(nest({}, {}), put(PROCESSOR, video_processor=None)),
    "keys outside the nested objects": put(PROCESSOR, size=LIMITS, images_kwargs={"size": LIMITS}),
}
FAULTY_PROCESSORS: dict[str, tuple[Change, str]] = {
    "image: one edge": (put(IMAGES, size={"longest_edge": 50_000}), "size"),
    "image: height and width": (put(IMAGES, size={"height": 64, "width": 64}), "size"),
    "image: other class": (put(IMAGES, image_processor_type="CLIPImageProcessor"), "image_processor_type"),
    "image: filter": (put(IMAGES, resample=2), "resample"),
    "image: filter null": (put(IMAGES, resample=None), "resample"),
    "image: factor": (put(IMAGES, rescale_factor=1 / 256), "rescale_factor"),
    "image: patch": (put(IMAGES, patch_size=14), "patch_size"),
    "image: empty file": (edit(IMAGES, lambda fields: fields.clear()), "patch_size"),
    "image: layout": (put(IMAGES, input_data_format="channels_last"), "input_data_format"),
    "image: mean": (put(IMAGES, image_mean=[0.1, 0.2, 0.3]), "image_mean"),
    "image: deviation 0": (put(IMAGES, image_std=[0.5, 0, 0.5]), "image_std"),
    "video: rate null": (put(VIDEOS, fps=None), "fps"),
    "video: rate as text": (put(VIDEOS, fps="2"), "fps"),
    "video: number of frames": (put(VIDEOS, num_frames=4), "num_frames"),
    "video: all frames": (put(VIDEOS, do_sample_frames=False), "do_sample_frames"),
    "video: limits null": (put(VIDEOS, size=None), "size"),
    "video: one edge": (put(VIDEOS, size={"longest_edge": 50_000}), "size"),
    "video: other class": (put(VIDEOS, video_processor_type="Qwen2VLVideoProcessor"), "video_processor_type"),
    "video: layout": (put(VIDEOS, input_data_format="channels_last"), "input_data_format"),
    "video: not resized": (put(VIDEOS, do_resize=False), "do_resize"),
    "video: not normalized": (put(VIDEOS, do_normalize=False), "do_normalize"),
    "video: merge": (put(VIDEOS, merge_size=1), "merge_size"),
    "video: frames of a patch": (put(VIDEOS, temporal_patch_size=1), "temporal_patch_size"),
    "tokenizer: older limits": (put("tokenizer_config.json", **OLDER_LIMITS), "min_pixels"),
    "tokenizer: rate": (put("tokenizer_config.json", fps=1), "fps"),
    "nested: rate": (nest({}, {"fps": 0}), "fps"),
    "nested: empty images": (both(nest({}, {}), put(PROCESSOR, image_processor={})), "patch_size"),
}


@pytest.fixture(scope="module")
def media() -> list[dict[str, Any]]:
    """Pictures and videos on both sides of the limits, with an odd number of frames too."""
    frames = [picture(100, 70, seed) for seed in range(3)]
    return [
        {"image": picture(400, 300)},
        {"image": picture(30, 20)},
        {"video": frames},
        {"video": clip("H.264 in MP4", 40, 10, 200, 120)},
        {"video": clip("H.264 in MP4", 9, 2, 64, 64)},
    ]


@pytest.mark.parametrize(
    "name",
    slow_except(
        PROCESSORS,
        "image: both limits",
        "video: older limits only",
        "video: 9 frames above the limit",
        "nested, older names",
    ),
)
def test_processor_files_give_the_pixels_of_transformers(name: str, folder: Path, media: list[dict[str, Any]]) -> None:
    PROCESSORS[name](folder)
    settings, oracle = Settings(), ProcessorOracle(folder)
    vision = read_vision_config(folder, settings)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (vision.mean, vision.std))
    preprocess = Preprocessor(load_tokenizer(folder), vision, settings)
    for item in media:
        ours, theirs = preprocess(item_from_fields(item)), oracle.inputs([item])
        kind = "video" if "video" in item else "image"
        expected = theirs["pixel_values_videos" if kind == "video" else "pixel_values"].numpy()
        (patches,) = ours.patches
        assert list(patches.grid_thw) == theirs[f"{kind}_grid_thw"][0].tolist()
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
        pixels = patches.pixels.reshape(len(expected), 3, patches.num_frames, -1) / 255
        assert np.abs((pixels - mean) / std - expected.reshape(len(expected), 3, 2, -1)).max() < 1e-6


@pytest.mark.parametrize("name", FAULTY_PROCESSORS)
def test_processor_file_that_cannot_be_followed_is_one_line_with_the_key(name: str, folder: Path) -> None:
    change, key = FAULTY_PROCESSORS[name]
    change(folder)
    places = r"processor_config\.json|image_processor|video_processor|tokenizer_config\.json"
    with pytest.raises(ModelUnavailable, match=rf"^[^:]*({places}): {key} ") as caught:
        read_vision_config(folder, Settings())
    assert "\n" not in str(caught.value)


TEMPLATE = """{# the same prompt in other words #}
{%- for turn in messages -%}
<|im_start|>{{ turn['role'] + '\n' }}
{%- if turn.content is string %}{{ turn.content }}{% else %}
{%- for part in turn.content -%}
{{ part.text if part.type == 'text' else '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}
{%- endfor %}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if tools %}{{ raise_exception('tools') | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKING = TEMPLATE.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
JINJA = "chat_template.jinja"


def write(file: str, content: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_text(content, encoding="utf-8")

    return apply


TEMPLATES: dict[str, tuple[Change, str]] = {
    "other words": (write(JINJA, TEMPLATE), JINJA),
    "older file": (both(remove(JINJA), put("chat_template.json", chat_template=TEMPLATE)), "chat_template.json"),
    "older file first": (
        both(write(JINJA, THINKING), put("chat_template.json", chat_template=TEMPLATE)),
        "chat_template.json",
    ),
    "nested first": (both(write(JINJA, THINKING), put(PROCESSOR, chat_template=TEMPLATE)), "processor_config.json"),
    "several": (put(PROCESSOR, chat_template={"default": TEMPLATE, "x": THINKING}), "processor_config.json"),
}
FAULTY_TEMPLATES: dict[str, tuple[Change, str]] = {
    "thinking": (write(JINJA, THINKING), rf"^{JINJA} renders another prompt.*<think>"),
    "older file": (put("chat_template.json", chat_template=THINKING), r"^chat_template\.json: chat_template renders"),
    "nested": (put(PROCESSOR, chat_template=THINKING), r"^processor_config\.json: chat_template renders"),
    "pictures first": (
        write(JINJA, TEMPLATE.replace("turn.content -", "turn.content | sort(attribute='type') -")),
        rf"^{JINJA} renders another prompt",
    ),
    "no turn of the assistant": (
        write(JINJA, TEMPLATE.replace("if add_generation_prompt", "if false")),
        "allowed there",
    ),
    "not a template": (write(JINJA, "{% for %}"), rf"^{JINJA} cannot be rendered: TemplateSyntaxError"),
    "raises": (write(JINJA, "{{ raise_exception('no') }}"), rf"^{JINJA} cannot be rendered: UndefinedError"),
    "reaches for Python": (write(JINJA, "{{ ''.__class__.__mro__ }}"), rf"^{JINJA} "),
    "neither text nor templates": (put(PROCESSOR, chat_template=7), "without a template named default"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_that_renders_the_prompt_is_accepted(name: str, folder: Path) -> None:
    change, file = TEMPLATES[name]
    change(folder)
    assert check_chat_template(folder).startswith(file)
    item = {"image": picture(70, 50), "text": "red\n"}
    ours = Preprocessor(load_tokenizer(folder), read_vision_config(folder, Settings()), Settings())
    assert (
        ours(item_from_fields(item)).input_ids.tolist()
        == ProcessorOracle(folder).inputs([item])["input_ids"][0].tolist()
    )


@pytest.mark.parametrize("name", FAULTY_TEMPLATES)
def test_chat_template_that_renders_another_prompt_stops_the_load(name: str, folder: Path) -> None:
    change, message = FAULTY_TEMPLATES[name]
    change(folder)
    with pytest.raises(ModelUnavailable, match=message) as caught, Embedder(str(folder), device="cpu"):
        pass
    assert "\n" not in str(caught.value)


def test_folder_without_a_chat_template_loads(folder: Path) -> None:
    remove(JINJA)(folder)
    assert check_chat_template(folder) == ""


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


@pytest.mark.parametrize(
    "name", slow_except(EQUAL, "torch_dtype", "rope_scaling", "head of its own", "trunk only", "sharded")
)
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
    monkeypatch.setattr(weights, "_set_weight", lambda *_, **__: pytest.fail("weights were loaded"))
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
