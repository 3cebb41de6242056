r"""A query and its documents -> the prompts that the reranker was trained on, as ModelInputs.

The prompt, as in the reference (QwenLM/Qwen3-VL-Embedding 8ce3aab, src/models/qwen3_vl_reranker.py, and the chat
template):

    <|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}<Query>:{query}\n
    <Document>:{document}<|im_end|>\n<|im_start|>assistant\n

(in one line). If the checkpoint's tokenizer appends tokens to a prompt, they follow, as in transformers. The score is
read at the last token. The instruction is used as it is. All pairs of a request begin with the same tokens, up to the
document. They are prepared once, as the request's `Query`, and the model computes their keys and values once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from embedder.errors import InputTooLong, InvalidRequest, ModelUnavailable
from embedder.inputs import prompt
from embedder.inputs.decoder import Decoder
from embedder.inputs.items import EmbeddingItem, describe_value
from embedder.inputs.preprocess import (
    SHORT_CHARS,
    ModelInput,
    Patches,
    Preprocessor,
    is_short_text,
    run_length,
)
from embedder.inputs.processor_config import VisionConfig
from embedder.inputs.prompt import TextPiece
from embedder.settings import Settings

JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
DEFAULT_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."

# `\n<Document>:` is cut in two where Qwen's pre-tokenizer always ends a word, so that the tokens of the first part do
# not depend on the document, and those of the second do not depend on the query.
_BEFORE_CUT, _AFTER_CUT = "\n<Document", ">:"

# Each pair reads all keys of its query. This many of them count as one token of the pair. It is an estimate, without
# which a pair with a long query would count as a short one.
KEYS_PER_TOKEN = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Query(EmbeddingItem):
    """What documents are judged against. Preprocessing it gives the tokens that all pairs of the request begin with.

    `instruction` None or empty: `DEFAULT_INSTRUCTION`. `num_documents`: how many pairs share the query's cost.
    `max_document_tokens`: number of tokens to which each document's text is cut, in addition to the items' limit.
    """

    num_documents: int = 1
    max_document_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(EmbeddingItem):
    """A document (`parts`) to score against a query.

    `query`: the preprocessed `Query`. `max_text_tokens`: its `max_document_tokens`.
    """

    query: ModelInput
    max_text_tokens: int | None = None


def pair_with(query: Query, prepared: ModelInput, document: EmbeddingItem) -> Pair:
    """The pair of a query, `prepared`, and one of its documents."""
    return Pair(
        document.parts,
        normalize=False,
        truncate=document.truncate,
        query=prepared,
        max_text_tokens=query.max_document_tokens,
    )


def is_short(item: EmbeddingItem) -> bool:
    """Whether preprocessing takes little time and memory: a pair holds a copy of its query's tokens."""
    return is_short_text(item) and not (isinstance(item, Pair) and item.query.num_tokens > SHORT_CHARS)


class PairPreprocessor(Preprocessor):
    """Preprocesses queries and pairs, and plain items as `Preprocessor` does. Thread-safe.

    `relative_cost`: cost of one token, in tokens of the embedding model that the process serves as well.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionConfig,
        settings: Settings,
        *,
        visual_cost: float = 1.0,
        relative_cost: float = 1.0,
    ) -> None:
        super().__init__(tokenizer, vision, settings, visual_cost=visual_cost)
        self._relative_cost = relative_cost
        self._system_ids = self._encode_fixed(prompt.prefix(JUDGE))
        self._check_cut()

    def __call__(self, item: EmbeddingItem, decoder: Decoder | None = None) -> ModelInput:
        """Raises `InvalidMedia`, `MediaTooLarge` and `InputTooLong`."""
        match item:
            case Query():
                return self._prepare_query(item, decoder)
            case Pair():
                return self._prepare_pair(item, decoder)
        return super().__call__(item, decoder)

    def _prepare_query(self, query: Query, decoder: Decoder | None) -> ModelInput:
        """The prefix of all pairs of the query. Its cost is one pair's share of it."""
        patches, seconds = self._load_patches(query, decoder)
        header = f"{prompt.USER_HEADER}<Instruct>: {query.instruction or DEFAULT_INSTRUCTION}<Query>:"
        pieces = prompt.user_turn(query, self._grids(patches), seconds, header=header, footer=_BEFORE_CUT)
        runs = [list(self._system_ids), *(self._encode_piece(piece) for piece in pieces)]
        self._check_length(sum(map(run_length, runs)))
        input_ids, position_ids, visual_index = self._assemble(runs)
        return ModelInput(
            input_ids,
            position_ids,
            visual_index,
            patches,
            num_prefix_tokens=len(input_ids) if query.num_documents > 1 else 0,
            num_cut_tokens=0,
            cost=math.ceil(self._cost(len(input_ids), patches) / query.num_documents),
            num_prefix_patches=len(patches) if query.num_documents > 1 else 0,
            prefix_key=_content_hash(patches) if query.num_documents > 1 else b"",
            is_pair=True,
        )

    def _prepare_pair(self, pair: Pair, decoder: Decoder | None) -> ModelInput:
        """The query's tokens, then the document's."""
        query = pair.query
        patches, seconds = self._load_patches(pair, decoder)
        pieces = prompt.user_turn(pair, self._grids(patches), seconds, header=_AFTER_CUT)
        max_tokens = self.settings.max_input_tokens - query.num_tokens
        runs, num_cut = self._encode(pieces, max_tokens, len(self._suffix_ids), pair.truncate, pair.max_text_tokens)
        input_ids, position_ids, visual_index = self._assemble([*runs, list(self._suffix_ids)])
        start = int(query.position_ids.max()) + 1
        return ModelInput(
            np.concatenate([query.input_ids, input_ids]),
            np.concatenate([query.position_ids, position_ids + start], axis=1),
            np.concatenate([query.visual_index, visual_index + query.num_tokens]),
            (*query.patches, *patches),
            num_prefix_tokens=query.num_prefix_tokens,
            num_cut_tokens=num_cut,
            cost=query.cost + self._cost(len(input_ids), patches) + self._cost_of_keys(query.num_prefix_tokens),
            num_prefix_patches=query.num_prefix_patches,
            prefix_key=query.prefix_key,
            is_pair=True,
        )

    def _check_length(self, num_query_tokens: int) -> None:
        allowed = self.settings.max_input_tokens - len(self._suffix_ids) - 1
        if num_query_tokens > allowed:
            raise InputTooLong(
                f"{num_query_tokens} tokens of query, instruction and template; allowed: {allowed}, because query and "
                f"document together may have {self.settings.max_input_tokens} (EMBEDDER_MAX_INPUT_TOKENS)"
            )

    def _cost(self, num_tokens: int, patches: Sequence[Patches]) -> int:
        return math.ceil(self._relative_cost * super()._cost(num_tokens, patches))

    def _cost_of_keys(self, num_keys: int) -> int:
        """The cost of attending to the keys of the query, which were computed before."""
        return math.ceil(self._relative_cost * num_keys / KEYS_PER_TOKEN)

    def _check_cut(self) -> None:
        """Raise `ModelUnavailable` if the tokenizer joins the two parts of `_BEFORE_CUT` and `_AFTER_CUT`."""
        for query, document in (("a", "b"), ("a?\n", "\n\n- b"), ("", ":>"), (" ", " ")):
            before, after = query + _BEFORE_CUT, _AFTER_CUT + document
            parts = [*self._encode_fixed((TextPiece(before),)), *self._encode_fixed((TextPiece(after),))]
            if parts != list(self._encode_fixed((TextPiece(before + after),))):
                raise ModelUnavailable("the checkpoint's tokenizer does not split words as Qwen3-VL's does")


def _content_hash(patches: Sequence[Patches]) -> bytes:
    """Identifies the content of images and videos; empty if there are none."""
    return b"".join(one.key or one.with_key().key for one in patches)


def part_of_pair(item: EmbeddingItem) -> EmbeddingItem:
    """The item itself, a query or a document. Raises `InvalidRequest` for options that only vectors have."""
    for name, value in (("instruction", None), ("dimensions", None), ("normalize", True)):
        if getattr(item, name) != value:
            raise InvalidRequest(
                f"{name}: got {describe_value(getattr(item, name))}; a query or a document has no {name}. An "
                "instruction goes with the whole request"
            )
    return item
