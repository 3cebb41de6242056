"""An item -> ModelInput: token ids, positions, patches, and cost in tokens. numpy only, thread-safe.

The checkpoint's tokenizer appends tokens to the prompt (Qwen's appends `<|endoftext|>`). The vector is the hidden state
at the last token.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedder.errors import InputTooLong, ModelUnavailable
from embedder.inputs import image, prompt, video
from embedder.inputs.decoder import Decoder
from embedder.inputs.items import EmbeddingItem, Image, Text, Truncate, Video
from embedder.inputs.limits import decode_deadline
from embedder.inputs.processor_config import VisionConfig
from embedder.inputs.prompt import Piece, Placeholders, SpecialToken, TextPiece
from embedder.inputs.word_ids import WordIds
from embedder.settings import Settings

MAX_PREFIX_TOKENS = 256  # of an instruction whose keys and values the model may cache
LONG_CHARS = 2**14  # tokenized in 4 ms; those of English are 4,000 tokens
SHORT_CHARS = 512  # tokenized in 0.14 ms (one core of an AMD EPYC, `python -m benchmarks.micro`)
_NO_INDEX = np.empty(0, np.int64)


@dataclass(frozen=True)
class Patches:
    """One image or video as patch rows, in the order of the merger's blocks.

    `pixels`: (grid_t * grid_h * grid_w, channels * num_frames * patch_size**2) uint8. `num_frames`: 1 for an image
    (the model sees it twice, which is folded into the weights), temporal_patch_size for a video.
    `grid_thw`: (grid_t, grid_h, grid_w) in patches. `key`: a hash of all of it; empty if it was not computed.
    """

    pixels: NDArray[np.uint8]
    grid_thw: tuple[int, int, int]
    num_frames: int
    key: bytes = b""

    def with_key(self) -> Patches:
        """The same with its key. Takes 0.8 ms for a MiB of pixels (one core of an AMD EPYC, `benchmarks.micro`)."""
        digest = hashlib.blake2b(repr((self.grid_thw, self.num_frames)).encode(), digest_size=32)
        digest.update(self.pixels.data)
        return replace(self, key=digest.digest())


class ModelInput(NamedTuple):
    """One item as the model takes it.

    `input_ids`: (num_tokens,) int64. `position_ids`: (3, num_tokens) int64: time, height, width (M-RoPE).
    `visual_index`: (num_visual_tokens,) int64, the indices of the visual tokens, in the order of `patches`.
    `num_prefix_tokens`: number of first tokens that other items may have in common: those of an instruction, or of a
    query. `num_prefix_patches`: number of first `patches` that belong to them, and `prefix_key` identifies their
    content. `num_cut_tokens`: tokens of the caller's text that were cut. `cost`: compute cost in tokens, for the
    scheduler. `is_pair`: whether the item is a query and a document, which the reranker scores.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    visual_index: NDArray[np.int64]
    patches: tuple[Patches, ...]
    num_prefix_tokens: int
    num_cut_tokens: int
    cost: int
    num_prefix_patches: int = 0
    prefix_key: bytes = b""
    is_pair: bool = False

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return len(self.input_ids)

    def sizes(self) -> tuple[int, int, int]:
        """`num_tokens`, `num_cut_tokens` and the number of visual tokens."""
        return self.num_tokens, self.num_cut_tokens, len(self.visual_index)

    @property
    def num_bytes(self) -> int:
        """Memory that the item holds by itself, in bytes."""
        pixels = sum([one.pixels.nbytes for one in self.patches[self.num_prefix_patches :]])
        return pixels + self.input_ids.nbytes + self.position_ids.nbytes

    def without_prefix(self) -> ModelInput:
        """The same item, with its prefix as ordinary tokens."""
        return self._replace(num_prefix_tokens=0, num_prefix_patches=0, prefix_key=b"")


class Preprocessor:
    """Preprocesses items for one checkpoint. Thread-safe.

    `visual_cost`: cost of one visual token in the vision tower, in tokens of the language tower. `hashes_media`:
    whether patches get their keys, which the vision cache needs.
    """

    hashes_media = False

    def __init__(
        self, tokenizer: Tokenizer, vision: VisionConfig, settings: Settings, *, visual_cost: float = 1.0
    ) -> None:
        self.vision = vision
        self.settings = settings
        self.visual_cost = visual_cost
        self.tokenizer = tokenizer
        appended_ids = self._appended_ids()
        tokenizer.encode_special_tokens = True  # encode a special token's name in a text as text
        self._words = WordIds(tokenizer)
        self._suffix_ids = (*self._encode_fixed(prompt.SUFFIX), *appended_ids)
        self._header_ids = list(self._encode_fixed((TextPiece(prompt.USER_HEADER),)))
        self._prefix_ids = lru_cache(maxsize=64)(lambda instruction: self._encode_fixed(prompt.prefix(instruction)))
        self._text_positions = np.broadcast_to(np.arange(settings.max_input_tokens), (3, settings.max_input_tokens))

    def __call__(self, item: EmbeddingItem, decoder: Decoder | None = None) -> ModelInput:
        """Decode, resize, tokenize. Raises `InvalidMedia`, `MediaTooLarge` and `InputTooLong`."""
        patches, seconds = self._load_patches(item, decoder)
        instruction = prompt.complete_instruction(item.instruction, self.settings.default_instruction)
        prefix_ids = self._prefix_ids(instruction)
        pieces = prompt.user_turn(item, self._grids(patches), seconds)
        limits = self.settings.max_input_tokens, len(prefix_ids) + len(self._suffix_ids), item.truncate
        encoded, num_cut = self._encode(pieces, *limits, item.max_text_tokens)
        runs: list[list[int] | Placeholders] = [list(prefix_ids), *encoded, list(self._suffix_ids)]
        input_ids, position_ids, visual_index = self._assemble(runs)
        return ModelInput(
            input_ids,
            position_ids,
            visual_index,
            patches,
            num_prefix_tokens=self._num_prefix_tokens(prefix_ids, encoded[0]),
            num_cut_tokens=num_cut,
            cost=self._cost(len(input_ids), patches),
        )

    def _grids(self, patches: Sequence[Patches]) -> list[tuple[int, int, int]]:
        """(steps, rows, columns) of the visual tokens of each image and clip."""
        merge = self.vision.merge_size
        return [(t, h // merge, w // merge) for t, h, w in (one.grid_thw for one in patches)]

    def _cost(self, num_tokens: int, patches: Sequence[Patches]) -> int:
        """The cost of these tokens, and of these patches in the vision tower, in tokens of the language tower."""
        num_patches = sum([len(one.pixels) for one in patches])
        return num_tokens + math.ceil(self.visual_cost * num_patches / self.vision.merge_size**2)

    def prompt_ids(self, item: EmbeddingItem, grids: list[tuple[int, int, int]], seconds: Sequence[Any]) -> list[int]:
        """The ids of an item's whole sequence, before it is cut. `grids` and `seconds`: as in `prompt.user_turn`."""
        instruction = prompt.complete_instruction(item.instruction, self.settings.default_instruction)
        ids = list(self._prefix_ids(instruction))
        for run in map(self._encode_piece, prompt.user_turn(item, grids, seconds)):
            ids += run if isinstance(run, list) else [self._token_id(run.token)] * run_length(run)
        return [*ids, *self._suffix_ids]

    def _load_patches(
        self, item: EmbeddingItem, decoder: Decoder | None
    ) -> tuple[tuple[Patches, ...], list[tuple[float, ...]]]:
        """Patches of each image and video, and the frame times of each video."""
        media = [part for part in item.parts if not isinstance(part, Text)]
        patches: list[Patches] = []
        seconds: list[tuple[float, ...]] = []
        if not media:
            return (), seconds
        deadline = decode_deadline(self.settings)
        for part in media:
            self._check_num_visual_tokens(patches)
            match part:
                case Image():
                    pixels = image.load_image(part.source, self.vision.regime, self.settings, deadline, decoder)
                    patches.append(patchify(pixels[None, None], self.vision.patch_size, self.vision.merge_size))
                case Video():
                    clip = video.load_video(part, self.vision.regime, self.settings, deadline, decoder)
                    frames = clip.frames.reshape(-1, self.vision.temporal_patch_size, *clip.frames.shape[1:])
                    patches.append(patchify(frames, self.vision.patch_size, self.vision.merge_size))
                    seconds.append(clip.seconds)
        return tuple(one.with_key() for one in patches) if self.hashes_media else tuple(patches), seconds

    def _check_num_visual_tokens(self, patches: Sequence[Patches]) -> None:
        """Raises `InputTooLong` before the next image is decoded, if those before it already exceed the limit."""
        num_tokens = sum(len(one.pixels) for one in patches) // self.vision.merge_size**2
        if num_tokens > self.settings.max_input_tokens:
            raise InputTooLong(
                f"{num_tokens} tokens of images and videos (the first {len(patches)}), which cannot be cut; "
                f"allowed: {self.settings.max_input_tokens} (EMBEDDER_MAX_INPUT_TOKENS)"
            )

    def _num_prefix_tokens(self, prefix_ids: Sequence[int], turn: list[int] | Placeholders) -> int:
        """Number of first tokens that depend on the instruction only.

        The header of the user's turn counts, unless its last token also covers the beginning of the text: the line
        break of the header and one at the start of a text are one token.
        """
        num_header = len(self._header_ids)
        num_tokens = len(prefix_ids)
        if isinstance(turn, list) and turn[:num_header] == self._header_ids:
            num_tokens += num_header
        return num_tokens if num_tokens <= MAX_PREFIX_TOKENS else 0

    def _encode_fixed(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        """Ids of pieces without the caller's content."""
        encoded, _ = self._encode(pieces, self.settings.max_input_tokens)
        return tuple(token for run in encoded if isinstance(run, list) for token in run)

    def _encode(
        self,
        pieces: Sequence[Piece],
        max_tokens: int,
        num_fixed: int = 0,
        truncate: Truncate = "end",
        max_text_tokens: int | None = None,
    ) -> tuple[list[list[int] | Placeholders], int]:
        """Pieces -> runs of ids and placeholders, and the number of tokens of the caller's text that were cut.

        Text is cut until the runs and `num_fixed` other tokens are at most `max_tokens`, and the caller's text at most
        `max_text_tokens`. Raises `InputTooLong`.
        """
        runs = [self._encode_piece(piece) for piece in pieces]
        total = num_fixed + sum(map(run_length, runs))
        excess = total - max_tokens
        if max_text_tokens is not None:
            excess = max(excess, sum(len(self._cuttable(piece)) for piece in pieces) - max_text_tokens)
        if excess > 0 and truncate == "none":
            raise InputTooLong(f"{total} tokens; allowed: up to {total - excess}, and `truncate` is none")
        num_cut = 0
        indices = range(len(runs)) if truncate == "start" else reversed(range(len(runs)))
        for index in indices:
            run = runs[index]
            if excess > num_cut and isinstance(run, list):
                cuttable = self._cuttable(pieces[index])
                num_drop = min(excess - num_cut, len(cuttable))
                drop = cuttable[:num_drop] if truncate == "start" else cuttable[len(cuttable) - num_drop :]
                runs[index] = run[: drop.start] + run[drop.stop :] if drop else run
                num_cut += num_drop
        if excess > num_cut:
            raise InputTooLong(
                f"{total} tokens, of which {total - num_cut} are instruction, template, "
                f"image or video tokens and cannot be cut; allowed: {max_tokens} (EMBEDDER_MAX_INPUT_TOKENS)"
            )
        return runs, num_cut

    def _cuttable(self, piece: Piece) -> range:
        """The indices of the piece's tokens that cover text of the caller only."""
        if not isinstance(piece, TextPiece) or piece.start == piece.end:
            return range(0)
        encoding = self.tokenizer.encode_batch([piece.text], add_special_tokens=False)[0]

        def characters(index: int) -> tuple[int, int]:  # to list those of all tokens would take long, with the GIL
            return encoding.token_to_chars(index) or (0, 0)

        indices = range(len(encoding))
        start = bisect_left(indices, piece.start, key=lambda index: characters(index)[0])
        stop = bisect_right(indices, piece.end, key=lambda index: characters(index)[1])
        return indices[start:stop]

    def _encode_piece(self, piece: Piece) -> list[int] | Placeholders:
        match piece:
            case TextPiece() if len(piece.text) > SHORT_CHARS:  # `encode` would hold the GIL
                return list(self.tokenizer.encode_batch_fast([piece.text], add_special_tokens=False)[0].ids)
            case TextPiece():
                return self._words.ids(piece.text)
            case SpecialToken():
                return [self._token_id(piece.token)]
            case Placeholders():
                return piece

    def _assemble(
        self, runs: Sequence[list[int] | Placeholders]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """`input_ids`, `position_ids` and `visual_index` of `ModelInput`.

        M-RoPE positions (transformers' `get_rope_index`): a text token advances all three axes by one. An image spans
        its rows and columns from its start position, and the next text starts after the longer side.
        """
        runs = _merge_adjacent_ids(runs)
        if len(runs) == 1 and isinstance(runs[0], list):  # text only
            return np.array(runs[0], np.int64), self._text_positions[:, : len(runs[0])], _NO_INDEX
        total = sum(map(run_length, runs))
        input_ids = np.empty(total, np.int64)
        position_ids = np.empty((3, total), np.int64)
        visual_index = []
        start = position = 0
        for run in runs:
            stop = start + run_length(run)
            if isinstance(run, Placeholders):
                input_ids[start:stop] = self._token_id(run.token)
                grid = np.indices((1, run.rows, run.columns)).reshape(3, -1)
                position_ids[:, start:stop] = grid + position
                visual_index.append(np.arange(start, stop))
                position += max(run.rows, run.columns)
            else:
                input_ids[start:stop] = run
                position_ids[:, start:stop] = self._text_positions[:, position : position + len(run)]
                position += len(run)
            start = stop
        return input_ids, position_ids, np.concatenate(visual_index)

    def _token_id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ModelUnavailable(f"the checkpoint's tokenizer has no token {token}; needed: a Qwen3-VL tokenizer")
        return token_id

    def _appended_ids(self) -> tuple[int, ...]:
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        if whole[: len(plain)] != plain:
            raise ModelUnavailable(
                "the checkpoint's tokenizer puts tokens before the text; needed: a Qwen3-VL tokenizer"
            )
        return tuple(whole[len(plain) :])


def patchify(frames: NDArray[np.uint8], patch_size: int, merge_size: int) -> Patches:
    """(grid_t, frames, height, width, channels) -> patch rows, in the order of transformers' image processor.

    The rows of one block of merge_size**2 neighboring patches, which the merger joins, are consecutive. Within a row
    the order is channel, frame, y, x.
    """
    grid_t, num_frames, height, width, channels = frames.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    planes = np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3))  # copies nothing, if `resample` has resized them
    lines = planes.view(f"V{patch_size}")  # of a patch: its bytes of one y are copied as one value
    blocks = lines.reshape(
        grid_t,
        num_frames,
        channels,
        grid_h // merge_size,
        merge_size,
        patch_size,
        grid_w // merge_size,
        merge_size,
    )
    rows = np.ascontiguousarray(blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5))
    pixels = rows.view(np.uint8).reshape(grid_t * grid_h * grid_w, -1)
    return Patches(pixels, (grid_t, grid_h, grid_w), num_frames)


def _merge_adjacent_ids(runs: Sequence[list[int] | Placeholders]) -> list[list[int] | Placeholders]:
    """Join adjacent runs of ids: a numpy call takes as long for one id as for ten."""
    merged: list[list[int] | Placeholders] = []
    for run in runs:
        last = merged[-1] if merged else None
        if isinstance(run, list) and isinstance(last, list):
            merged[-1] = last + run
        else:
            merged.append(run)
    return merged


def run_length(run: list[int] | Placeholders) -> int:
    """Length of a run of ids or placeholders."""
    return run.rows * run.columns if isinstance(run, Placeholders) else len(run)


def is_short_text(item: EmbeddingItem) -> bool:
    """Whether preprocessing takes less time than handing the item to another thread."""
    return all(isinstance(part, Text) for part in item.parts) and num_chars(item) <= SHORT_CHARS


def num_chars(item: EmbeddingItem) -> int:
    """Characters of the item's texts and its instruction."""
    return sum([len(part.text) for part in item.parts if isinstance(part, Text)], len(item.instruction or ""))
