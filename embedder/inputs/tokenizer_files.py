"""The checkpoint's tokenizer: `tokenizer.json`, checked to give the same ids as transformers does with the folder.

transformers builds the normalizer, the pre-tokenizer and the model of Qwen2's tokenizer itself, and adds the tokens
that further files name. So a value with which transformers would give other ids to the same text is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from embedder.errors import ModelUnavailable
from embedder.inputs.items import json_value
from embedder.inputs.json_file import read_json

_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes for which transformers reads the file as it is
SPLIT = (  # of Qwen2's tokenizer, and of the published checkpoints
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMALIZER = {"type": "NFC"}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load `tokenizer.json`, without the truncation and padding saved in it.

    Training tools save both, and they would cut or pad every text. transformers ignores them by default, too. Raises
    `ModelUnavailable`, with file and key.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelUnavailable(f"{folder} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no class of its own
        raise ModelUnavailable(f"{path} is not a tokenizer file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    fields, config = read_json(path), read_json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") not in _AS_IT_IS:
        _check_parts(path, fields)
    if config.get("add_prefix_space"):
        raise ModelUnavailable(f"{folder / 'tokenizer_config.json'}: add_prefix_space is true; allowed: false")
    _check_added_tokens(folder, config, fields.get("added_tokens") or [])
    return tokenizer


def _check_parts(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises `ModelUnavailable` if a part is not the one that transformers builds for Qwen2's tokenizer."""
    normalizer, model = fields.get("normalizer"), fields.get("model") or {}
    if normalizer != NORMALIZER:
        raise ModelUnavailable(f"{path}: normalizer is {json_value(normalizer)}; allowed: {{'type': 'NFC'}}")
    for key in ("dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ModelUnavailable(f"{path}: model.{key} is {json_value(model[key])}; allowed: none")
    if not is_qwen2_split(fields.get("pre_tokenizer")):
        raise ModelUnavailable(
            f"{path}: pre_tokenizer is not that of Qwen2's tokenizer; allowed: Split, then ByteLevel"
        )


def is_qwen2_split(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer, as tokenizer.json has it, is that of Qwen2's tokenizer."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or []
    return (
        [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and steps[0].get("pattern") == {"Regex": SPLIT}
        and (steps[0].get("behavior"), steps[0].get("invert")) == ("Isolated", False)
        and not steps[1].get("add_prefix_space")
        and not steps[1].get("use_regex")
    )


def _check_added_tokens(folder: Path, config: Mapping[str, Any], known: list[dict[str, Any]]) -> None:
    """Raises `ModelUnavailable` if another file names an added token that tokenizer.json does not have as such."""
    by_content = {token["content"]: token for token in known}
    for place, content, token_id, flags in _named_tokens(folder, config):
        token = by_content.get(content)
        if token is None:
            raise ModelUnavailable(f"{place} has {content!r}; allowed: the added_tokens of tokenizer.json")
        if token_id is not None and token_id != token["id"]:
            raise ModelUnavailable(f"{place} has {content!r} as {token_id}; tokenizer.json has it as {token['id']}")
        for flag in _FLAGS:
            if flags.get(flag, token[flag]) != token[flag]:
                raise ModelUnavailable(
                    f"{place} has {content!r} with {flag}={json_value(flags[flag])}; tokenizer.json differs"
                )


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str, int | None, Mapping[str, Any]]]:
    """Place, content, id and flags of each token that another file than tokenizer.json names."""
    file = folder / "tokenizer_config.json"
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        yield f"{file}: added_tokens_decoder", token["content"], int(token_id), token
    for content, token_id in read_json(folder / "added_tokens.json").items():
        yield f"{folder / 'added_tokens.json'}: {content}", content, token_id, {}
    for path, fields in (
        (file, config),
        (folder / "special_tokens_map.json", read_json(folder / "special_tokens_map.json")),
    ):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            named = fields.get(key) or []
            for token in named.values() if isinstance(named, dict) else named:
                content = token["content"] if isinstance(token, dict) else token
                yield f"{path}: {key}", content, None, token if isinstance(token, dict) else {}
