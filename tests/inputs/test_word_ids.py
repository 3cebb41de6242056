"""Ids that are put together from known words are those of the tokenizer."""

from __future__ import annotations

import re

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from embedder.inputs import word_ids
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.inputs.word_ids import WordIds
from embedder.model.checkpoint import BUNDLED

PIECES = st.sampled_from(
    ["red", " red", "it's", "'LL", "'s", " ", "  ", "\n", "\r\n", "\t", "\x1c", "1", "42", "!", "<", "|"]
)
TEXTS = st.one_of(
    st.text(st.characters(max_codepoint=127)),
    st.lists(PIECES).map("".join),
    st.lists(st.one_of(PIECES, st.sampled_from(["<think>", "<|im_end|>", "é", "ſ"]))).map("".join),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = load_tokenizer(BUNDLED)
    loaded.encode_special_tokens = True
    return loaded


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> WordIds:
    return WordIds(tokenizer)


@hypothesis.given(text=TEXTS)
def test_ids_are_those_of_the_tokenizer_at_first_and_when_all_words_are_known(
    text: str, tokenizer: Tokenizer, words: WordIds
) -> None:
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert words.ids(text) == expected
    assert words.ids(text) == expected


def test_known_words_are_not_tokenized_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = WordIds(tokenizer)
    expected = words.ids("a red cat"), words.ids("a blue dog")
    monkeypatch.setattr(words, "_tokenizer", None)
    assert (words.ids("a red cat"), words.ids("a blue dog")) == expected
    assert words.ids("a red dog") == [*expected[0][: len(words.ids("a red"))], *words.ids(" dog")]
    with pytest.raises(AttributeError):
        words.ids("a red bird")


def test_words_are_forgotten_when_there_are_too_many(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_ids, "MAX_WORDS", 3)
    words = WordIds(tokenizer)
    for text in ("one two", "three four", "one two"):
        assert words.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids
        assert len(words._known) <= 3


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_another_tokenizer_is_always_asked(part: str) -> None:
    other = load_tokenizer(BUNDLED)
    if part == "normalizer":
        other.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    else:
        other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = WordIds(other)
    for text in ("It's RED", "It's RED 42"):
        assert words.ids(text) == words.ids(text) == other.encode(text, add_special_tokens=False).ids
    assert not words._known


@pytest.mark.parametrize("is_noticed", [True, False])
@pytest.mark.parametrize("has_prefix_space", [True, False])
def test_word_after_a_space_is_not_taken_for_the_word_itself_if_offsets_are_trimmed(
    has_prefix_space: bool, is_noticed: bool
) -> None:
    other = load_tokenizer(BUNDLED)
    other.post_processor = processors.ByteLevel(add_prefix_space=has_prefix_space, trim_offsets=True)
    words = WordIds(other)
    assert not words._is_enabled
    words._is_enabled = not is_noticed
    for text in ("red red", "red", " red", "  red red"):
        assert words.ids(text) == words.ids(text) == other.encode(text, add_special_tokens=False).ids


def test_words_are_remembered_with_the_post_processor_of_the_published_checkpoints() -> None:
    other = load_tokenizer(BUNDLED)
    other.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    words = WordIds(other)
    words.ids("red red")
    assert set(words._known) == {"red", " red"}


def test_words_that_the_tokenizer_splits_elsewhere_are_not_remembered(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_ids, "_WORDS", re.compile(r"\S+\s?"))  # the blank belongs to the next word
    words = WordIds(tokenizer)
    for text in ("a red cat", "red a cat", "cat red"):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert words.ids(text) == words.ids(text) == expected
