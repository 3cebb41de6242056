"""Text over the token limit is cut at its end or its start, or refused, as `truncate` says; usage counts the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor

from embedder import Embedder
from embedder.errors import InputTooLong
from embedder.inputs.items import EmbeddingItem, Image, Text, Truncate, Video, item_from_fields
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.settings import Settings
from tests.conftest import picture, words
from tests.model.test_parity import assert_equal
from tests.oracle import Oracle

TAIL = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor(random_checkpoint: Path) -> Any:
    return Qwen3VLProcessor.from_pretrained(random_checkpoint)


@pytest.fixture(scope="module")
def prepare(random_checkpoint: Path) -> Any:
    """`prepare(item, max_input_tokens)` -> ModelInput."""

    def prepare(item: EmbeddingItem, limit: int = 8192) -> ModelInput:
        settings = Settings(max_input_tokens=limit)
        vision = read_vision_config(random_checkpoint, settings)
        return Preprocessor(load_tokenizer(random_checkpoint), vision, settings)(item)

    return prepare


def text_item(text: str, truncate: Truncate = "end") -> EmbeddingItem:
    return EmbeddingItem((Text(text),), truncate=truncate)


def head_ids(processor: Any) -> list[int]:
    """Ids of everything before the caller's text."""
    text = "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("excess", [1, 2, 50, 150])
def test_start_cuts_only_the_beginning_of_the_text(excess: int, prepare: Any, processor: Any) -> None:
    whole = prepare(text_item(words(200))).input_ids.tolist()
    head = head_ids(processor)
    cut = prepare(text_item(words(200), "start"), len(whole) - excess)
    assert whole[: len(head)] == head
    assert cut.input_ids.tolist() == head + whole[len(head) + excess :]
    assert (cut.num_tokens, cut.num_cut_tokens) == (len(whole) - excess, excess)
    assert np.array_equal(cut.position_ids, np.tile(np.arange(cut.num_tokens), (3, 1)))


def test_end_is_the_default(prepare: Any) -> None:
    item = EmbeddingItem((Text(words(200)),))
    assert item.truncate == "end"
    end, start = (prepare(text_item(words(200), truncate), 100).input_ids for truncate in ("end", "start"))
    assert np.array_equal(prepare(item, 100).input_ids, end)
    assert not np.array_equal(start, end)


def test_first_text_is_cut_first_by_start_and_last_by_end(prepare: Any) -> None:
    parts = (Text(words(60, 1)), Image(picture(64, 64)), Text(words(40, 2)))
    whole = prepare(EmbeddingItem(parts))
    pad = int(whole.visual_index[0])
    limit = whole.num_tokens - 30
    start = prepare(EmbeddingItem(parts, truncate="start"), limit)
    end = prepare(EmbeddingItem(parts, truncate="end"), limit)
    assert start.input_ids[pad - 30 :].tolist() == whole.input_ids[pad:].tolist(), "what follows the picture is whole"
    assert end.input_ids[: pad + 5].tolist() == whole.input_ids[: pad + 5].tolist(), "what precedes it is whole"
    more = prepare(EmbeddingItem(parts, truncate="start"), len(whole.input_ids[pad:]) + 20)
    assert more.num_cut_tokens == whole.num_tokens - more.num_tokens
    assert more.num_tokens == len(whole.input_ids[pad:]) + 20


@pytest.mark.parametrize("truncate", ["start", "end"])
def test_images_times_and_template_are_never_cut(truncate: Truncate, prepare: Any, processor: Any) -> None:
    clip = Video(tuple(picture(64, 64, seed) for seed in range(4)))
    parts = (Text(words(30, 1)), clip, Text(words(30, 2)), Image(picture(96, 64)), Text(words(30, 3)))
    whole = prepare(EmbeddingItem(parts))
    least = prepare(EmbeddingItem((clip, Image(picture(96, 64))))).num_tokens + 6
    for limit in range(least, whole.num_tokens, 11):
        cut = prepare(EmbeddingItem(parts, truncate=truncate), limit)
        text = processor.tokenizer.decode(cut.input_ids)
        assert cut.num_tokens == limit
        assert len(cut.visual_index) == len(whole.visual_index)
        assert (text.count(" seconds>"), text.count("<|vision_start|>")) == (2, 3)
        assert TAIL in text
        assert cut.position_ids.max() < whole.position_ids.max()


def test_none_refuses_with_both_numbers(prepare: Any) -> None:
    num_tokens = prepare(text_item(words(200))).num_tokens
    assert prepare(text_item(words(200), "none"), num_tokens).num_cut_tokens == 0
    with pytest.raises(InputTooLong) as caught:
        prepare(text_item(words(200), "none"), num_tokens - 1)
    assert str(caught.value) == f"{num_tokens} tokens; allowed: up to {num_tokens - 1}, and `truncate` is none"


@pytest.mark.parametrize("truncate", ["start", "end", "none"])
def test_image_that_does_not_fit_is_refused_with_every_policy(truncate: Truncate, prepare: Any) -> None:
    with pytest.raises(InputTooLong, match=r"^\d+ tokens.*allowed:.* 100\b"):
        prepare(EmbeddingItem((Text(words(50)), Image(picture(320, 320))), truncate=truncate), 100)


def test_policy_has_no_effect_if_everything_fits(prepare: Any) -> None:
    ids = [prepare(text_item("red", truncate)).input_ids.tolist() for truncate in ("end", "start", "none")]
    assert ids[0] == ids[1] == ids[2]


def test_start_cut_equals_transformers_and_usage_counts_the_rest(random_checkpoint: Path, processor: Any) -> None:
    text, limit = words(1000), 100
    oracle = Oracle(random_checkpoint)
    head = head_ids(processor)
    tail = processor.tokenizer(TAIL)["input_ids"]
    ids = processor.tokenizer(f"user\n{text}", add_special_tokens=False)["input_ids"]
    kept = [*head, *ids[len(ids) - (limit - len(head) - len(tail)) :], *tail]
    with torch.no_grad():
        state = oracle.model(input_ids=torch.tensor([kept])).last_hidden_state[0, -1]
    with Embedder(str(random_checkpoint), device="cpu", max_input_tokens=limit) as embedder:
        item = item_from_fields({"text": text, "truncate": "start"})
        assert_equal(embedder.embed([item]), torch.nn.functional.normalize(state, dim=0).numpy()[None])
        embedding = embedder.engine.submit(item).result()
    assert embedding.num_tokens == limit
    num_user = len(processor.tokenizer("user\n", add_special_tokens=False)["input_ids"])
    assert embedding.num_tokens + embedding.num_cut_tokens == len(head) + len(ids) - num_user + len(tail)


def test_refused_item_of_a_list_is_named_by_its_index(random_checkpoint: Path) -> None:
    with Embedder(str(random_checkpoint), device="cpu", max_input_tokens=64) as embedder:
        with pytest.raises(InputTooLong, match=r"^item 1: \d+ tokens; allowed: up to 64"):
            embedder.embed(["red", {"text": words(200), "truncate": "none"}])
        assert len(embedder.embed([{"text": words(200), "truncate": "start"}])) == 1
