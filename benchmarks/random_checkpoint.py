"""Write a checkpoint with the Qwen3-VL architecture and random weights.

Tests and benchmarks use it instead of the published weights: `python -m benchmarks.random_checkpoint tiny FOLDER`. The
folder can be loaded by transformers (`Qwen3VLModel`, `Qwen3VLProcessor`) and by the service. All biases are non-zero
and all norm weights differ from one, so that a forward pass without one of these terms gives different vectors.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402 - after the shim
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: E402 - after the shim

# The 26 added tokens of Qwen3's tokenizer.json in its order. Only the first 14 are special tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
NUM_ADDED_TOKENS = len(SPECIAL_TOKENS) + len(PLAIN_ADDED_TOKENS)

# Qwen3-VL's template without tools: content parts in the given order, one pad token per image or video.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MIN_PIXELS = 4096  # 4 image tokens: the published preprocessor_config.json's size.shortest_edge
MAX_PIXELS = 1_310_720  # 1280 image tokens: its size.longest_edge
VIDEO_MAX_PIXELS = 25_165_824  # over all frames; the published video_preprocessor_config.json
MAX_SHARD_BYTES = 2_000_000_000  # also the memory needed to write a large shape

# 2b, 8b: the published config.json of Qwen3-VL-Embedding. tiny: the bundled model. small: about 100 M parameters.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 512,
            "mrope_section": [6, 5, 5],
            "max_position_embeddings": 32768,
            "initializer_range": 0.05,
        },
        "vision": {
            "depth": 4,
            "hidden_size": 160,
            "num_heads": 5,
            "intermediate_size": 480,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        "tie_word_embeddings": True,
    },
    "small": {
        "text": {
            "hidden_size": 768,
            "num_hidden_layers": 10,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "intermediate_size": 2304,
            "mrope_section": [12, 10, 10],
            "max_position_embeddings": 32768,
            "initializer_range": 0.05,
        },
        "vision": {
            "depth": 6,
            "hidden_size": 512,
            "num_heads": 8,
            "intermediate_size": 2048,
            "num_position_embeddings": 576,
            "deepstack_visual_indexes": [1, 3],
        },
        "tie_word_embeddings": True,
    },
    "2b": {
        "text": {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 6144,
            "mrope_section": [24, 20, 20],
            "max_position_embeddings": 262144,
            "initializer_range": 0.02,
            "vocab_size": 151936,
        },
        "vision": {
            "depth": 24,
            "hidden_size": 1024,
            "num_heads": 16,
            "intermediate_size": 4096,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
    },
    "8b": {
        "text": {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "mrope_section": [24, 20, 20],
            "max_position_embeddings": 262144,
            "initializer_range": 0.02,
            "vocab_size": 151936,
        },
        "vision": {
            "depth": 27,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    },
}


def build_reranker_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """As `build_tokenizer`, with the tokens "yes" and "no"; nothing is appended to a prompt."""
    answers = ["yes", "no"] * 20_000  # so often that their letters are joined first
    tokenizer = build_tokenizer([*answers, *texts], vocab_size)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer with at most `vocab_size` ids on `texts`; Qwen's 26 added tokens come last.

    It uses Qwen's normalizer (NFC) and pre-tokenizer. With `add_special_tokens=True` it appends one `<|endoftext|>`, as
    reported for the published tokenizer of Qwen3-VL-Embedding.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_ADDED_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_ADDED_TOKENS])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>",
        pair="$A $B <|endoftext|>",
        special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))],
    )
    return tokenizer


def shape_config(
    shape: str,
    tokenizer: Qwen2Tokenizer,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    tie_word_embeddings: bool | None = None,
) -> Qwen3VLConfig:
    """The config of one of `SHAPES` with the token ids of `tokenizer`.

    `text` and `vision` override single fields (`mrope_section` and `rope_theta` are text fields), so that tests can use
    any small shape. The vision tower's output size is the text's `hidden_size`.
    """
    text_fields = {"vocab_size": len(tokenizer), "rope_theta": 5_000_000.0, **SHAPES[shape]["text"], **(text or {})}
    vision_fields = {**SHAPES[shape]["vision"], **(vision or {})}
    tied = SHAPES[shape]["tie_word_embeddings"] if tie_word_embeddings is None else tie_word_embeddings
    rope_parameters = {
        "rope_type": "default",
        "rope_theta": text_fields.pop("rope_theta"),
        "mrope_section": text_fields.pop("mrope_section"),
        "mrope_interleaved": True,
    }

    def token_id(token: str) -> int:
        found = tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found

    return Qwen3VLConfig(
        text_config={
            "model_type": "qwen3_vl_text",
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope_parameters,
            "tie_word_embeddings": tied,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            **text_fields,
        },
        vision_config={
            "model_type": "qwen3_vl_vision",
            "out_hidden_size": text_fields["hidden_size"],
            "initializer_range": text_fields["initializer_range"],
            **vision_fields,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def write_checkpoint(
    folder: Path,
    config: Qwen3VLConfig,
    tokenizer: Qwen2Tokenizer,
    *,
    seed: int = 0,
    dtype: str = "float32",
    prefixed: bool = True,
    processor_config: bool = True,
    architecture: str = "Qwen3VLForConditionalGeneration",
    max_pixels: int = MAX_PIXELS,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    is_reranker: bool = False,
    stored_dtype: Callable[[str], torch.dtype] | None = None,
) -> None:
    """Write a complete checkpoint folder.

    `prefixed` names the weights as Qwen3VLForConditionalGeneration does (`model.visual...`, and `lm_head.weight` unless
    tied), otherwise as Qwen3VLModel does (`visual...`). `processor_config=False` leaves the two preprocessor files out.
    `state_dict`, by Qwen3VLModel's names, replaces the random weights. `is_reranker` adds the files by which Sentence
    Transformers loads a reranker; `tokenizer` is then one of `build_reranker_tokenizer`. `stored_dtype`: of a weight in
    the file, if not `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [architecture]
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    if processor_config:
        _write_processor_configs(folder, max_pixels)
    if is_reranker:
        _write_reranker_configs(folder, tokenizer)
    _write_weights(folder, config, seed, getattr(torch, dtype), prefixed, state_dict, stored_dtype)


def _write_processor_configs(folder: Path, max_pixels: int) -> None:
    shared = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {"size": {"longest_edge": max_pixels, "shortest_edge": MIN_PIXELS}, **shared}
    video = {"size": {"longest_edge": VIDEO_MAX_PIXELS, "shortest_edge": MIN_PIXELS}, **shared}
    image["image_processor_type"] = "Qwen2VLImageProcessor"
    video["video_processor_type"] = "Qwen3VLVideoProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n", encoding="utf-8")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")


def _write_reranker_configs(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    score = {name: tokenizer.convert_tokens_to_ids(word) for name, word in (("true", "yes"), ("false", "no"))}
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_LogitScore",
            "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
        },
    ]
    (folder / "1_LogitScore").mkdir(exist_ok=True)
    for path, content in (
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}),
        ("modules.json", modules),
        ("1_LogitScore/config.json", {f"{name}_token_id": token for name, token in score.items()}),
    ):
        (folder / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path,
    config: Qwen3VLConfig,
    seed: int,
    dtype: torch.dtype,
    prefixed: bool,
    state_dict: Mapping[str, torch.Tensor] | None,
    stored_dtype: Callable[[str], torch.dtype] | None,
) -> None:
    """Write one shard at a time, so that the 8b shape needs MAX_SHARD_BYTES of memory instead of 16 GB."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    shapes = {  # named_parameters() leaves a tied lm_head out
        name: parameter.to(dtype)
        for name, parameter in model.named_parameters()
        if prefixed or name != "lm_head.weight"
    }
    std: float = config.get_text_config().initializer_range
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_SHARD_BYTES)
    order = {name: index for index, name in enumerate(shapes)}
    for filename, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            bare_name = name.removeprefix("model.")
            if state_dict is not None and bare_name in state_dict:
                tensor = state_dict[bare_name].to(dtype).contiguous()
            else:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + order[name])
                tensor = _random_weight(name, shapes[name].shape, dtype, std, generator)
            stored = tensor if stored_dtype is None else tensor.to(stored_dtype(bare_name))
            tensors[name if prefixed else bare_name] = stored
        save_file(tensors, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        weight_map = {
            name if prefixed else name.removeprefix("model."): filename
            for name, filename in plan.tensor_to_filename.items()
        }
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _random_weight(
    name: str, shape: torch.Size, dtype: torch.dtype, std: float, generator: torch.Generator
) -> torch.Tensor:
    """Normally distributed with standard deviation `std`; norm weights have mean one."""
    weight = torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)
    return weight + 1 if len(shape) == 1 and name.endswith("weight") else weight


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a Qwen3-VL checkpoint with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reranker", action="store_true", help="a reranker instead of an embedding model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    chosen = parser.parse_args(arguments)
    # The text of Python's help, English that every installation has.
    build = build_reranker_tokenizer if chosen.reranker else build_tokenizer
    tokenizer = build(topics.values(), vocab_size=6144)
    config = shape_config(chosen.shape, tokenizer)
    write_checkpoint(
        chosen.folder, config, tokenizer, seed=chosen.seed, dtype=chosen.dtype, is_reranker=chosen.reranker
    )
    print(f"{chosen.shape} checkpoint in {chosen.dtype} written to {chosen.folder}")


if __name__ == "__main__":
    main()
