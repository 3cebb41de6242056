r"""An item's instruction and parts -> the chat text the model was trained on, as pieces ready to tokenize.

The text, as in the reference (QwenLM/Qwen3-VL-Embedding 8ce3aab, `format_model_input` and the chat template):

    <|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{parts}<|im_end|>\n<|im_start|>assistant\n

What follows it is the tokenizer's business (`preprocess`). Special tokens are pieces of their own, so that nothing
a caller writes can be mistaken for one: `<|im_end|>` inside a text stays text. (The reference would end the turn.)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from embedder.inputs.items import EmbeddingItem, Image, Text


@dataclass(frozen=True)
class Special:
    """One special token."""

    token: str


@dataclass(frozen=True)
class Words:
    """Text between two special tokens, tokenized as a whole. Of it, `text[start:end]` is the caller's."""

    text: str
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Pads:
    """One picture, or two frames of a video: `rows * columns` placeholder tokens."""

    token: str
    rows: int
    columns: int


Piece = Special | Words | Pads

IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
HEADER = "user\n"  # of the user's turn
_START, _END = Special("<|im_start|>"), Special("<|im_end|>")
_VISION_START, _VISION_END = Special("<|vision_start|>"), Special("<|vision_end|>")
TAIL: tuple[Piece, ...] = (
    _END,
    Words("\n"),
    _START,
    Words("assistant\n"),
)  # behind the user's turn


def complete_instruction(instruction: str | None, default: str) -> str:
    """Strip, fall back to the default where nothing is left, end with punctuation. As in the reference."""
    instruction = (instruction or "").strip()
    if not instruction:
        return default
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else f"{instruction}."


def prefix(instruction: str) -> tuple[Piece, ...]:
    """The pieces before the caller's content, up to the header of the user's turn. Same for one instruction."""
    return (_START, Words(f"system\n{instruction}"), _END, Words("\n"), _START)


def user_turn(
    item: EmbeddingItem, grids: Sequence[tuple[int, int, int]], seconds: Sequence[Sequence[float]] = ()
) -> tuple[Piece, ...]:
    r"""The pieces from `user\n` to the end of the caller's content; `TAIL` follows.

    `grids` has (frames, rows, columns) in tokens for each picture and clip of the item, in order; `seconds`, for each
    clip, has the time of each of its frames. A clip is, for each two frames, `<{seconds} seconds>` and a picture of
    `<|video_pad|>`, without a frame around them all: the form the checkpoints were published with (transformers 4.57;
    later versions keep an outer pair).
    """
    pieces: list[Piece] = []
    words, start = HEADER, len(HEADER)
    end = start
    remaining, clips = iter(grids), iter(seconds)
    for part in item.parts:
        if isinstance(part, Text):
            words += part.text
            end = len(words)
            continue
        frames, rows, columns = next(remaining)
        times = () if isinstance(part, Image) else next(clips)
        for frame in range(frames):
            if not isinstance(part, Image):
                words += f"<{_middle(times, frame):.1f} seconds>"
            if words:
                pieces.append(Words(words, start, end))
            token = IMAGE_PAD if isinstance(part, Image) else VIDEO_PAD
            pieces += [_VISION_START, Pads(token, rows, columns), _VISION_END]
            words, start, end = "", 0, 0
    if words:
        pieces.append(Words(words, start, end))
    return tuple(pieces)


def _middle(times: Sequence[float], pair: int) -> float:
    """Time between two frames, as transformers' `_calculate_timestamps`."""
    return (times[2 * pair] + times[2 * pair + 1]) / 2
