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
        self._is_enabled = normalizer == NORMALIZER and is_qwen2_split(pre_tokenizer)
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
            return self._remember(words, text)
        return ids

    def _remember(self, words: list[str], text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(self._known) + len(words) > MAX_WORDS:
            self._known = {}
        found: dict[str, tuple[int, ...]] = {}
        tokens = zip(encoding.word_ids, encoding.ids, encoding.offsets, strict=True)
        for _, group in groupby(tokens, key=lambda token: token[0]):
            _, ids, offsets = zip(*group, strict=True)
            found[text[offsets[0][0] : offsets[-1][1]]] = ids
        # A word that the tokenizer does not see as one would be wrong in other texts.
        self._known.update((word, found[word]) for word in words if len(word) <= MAX_WORD_CHARS and word in found)
        return list(encoding.ids)
