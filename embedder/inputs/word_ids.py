"""Short ASCII texts -> token ids, from the ids of words that were tokenized before.

Qwen2's tokenizer splits a text into words by one pattern and tokenizes each word by itself, so a word has the same ids
in every text. Looking up 17 words takes 2.4 µs; the tokenizer takes 21 and holds the GIL (one core of an AMD EPYC,
`python -m benchmarks.micro`). A text with a word that is not known goes to the tokenizer, and its words are remembered.
"""

from __future__ import annotations

import json
import re
from itertools import groupby

from tokenizers import Tokenizer

from embedder.inputs.tokenizer_files import NORMALIZER, is_qwen2_split

MAX_WORDS = 2**15  # remembered, about 8 MB; then all are forgotten
MAX_WORD_CHARS = 32  # longer ones are rarely repeated

# `tokenizer_files.SPLIT` for ASCII: \p{L} and \p{N} are these letters and digits
_WORDS = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)


class WordIds:
    """Tokenizes short texts without special tokens. Threads may share it: all of them store the same ids for a word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}
        normalizer, pre_tokenizer = (
            json.loads(part.__getstate__()) if part else None
            for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)
        )
        is_qwen2 = normalizer == NORMALIZER and is_qwen2_split(pre_tokenizer)
        self._is_enabled = is_qwen2 and not _trims_offsets(tokenizer)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")  # they are no words

    def ids(self, text: str) -> list[int]:
        """The ids of `tokenizer.encode(text, add_special_tokens=False)`."""
        if not (self._is_enabled and text.isascii()) or self._added.search(text):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        words = _WORDS.findall(text)
        ids: list[int] = []
        try:
            for word in words:
                ids += self._known[word]
        except KeyError:
            return self._remember(text, len(words))
        return ids

    def _remember(self, text: str, num_words: int) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(self._known) + num_words > MAX_WORDS:
            self._known = {}
        tokens = zip(encoding.word_ids, encoding.ids, encoding.offsets, strict=True)
        groups = groupby(tokens, key=lambda token: token[0])
        for (_, group), word in zip(groups, _WORDS.finditer(text), strict=False):
            _, ids, offsets = zip(*group, strict=True)
            # The ids of a group that is not exactly this word would be wrong in other texts.
            if (offsets[0][0], offsets[-1][1]) == word.span() and len(word[0]) <= MAX_WORD_CHARS:
                self._known[word[0]] = ids
        return list(encoding.ids)


def _trims_offsets(tokenizer: Tokenizer) -> bool:
    """Whether the offsets of a word leave out its leading space, as with a ByteLevel post-processor that trims them.

    Then they do not show where a word begins, and few words could be remembered.
    """
    return all(start != 1 for start, _ in tokenizer.encode("a a", add_special_tokens=False).offsets)
