r"""An item's instruction and parts -> the chat prompt that the model was trained on, as pieces to tokenize.

The prompt, as in the reference (QwenLM/Qwen3-VL-Embedding 8ce3aab, `format_model_input` and the chat template):

    <|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{parts}<|im_end|>\n<|im_start|>assistant\n

The tokenizer appends further tokens (`preprocess`). Special tokens are separate pieces, and callers' text is never
parsed for them: `<|im_end|>` inside a text stays text. (In the reference it ends the turn.)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from embedder.inputs.items import EmbeddingItem, Image, Text

QUERY_INSTRUCTION = "Retrieve images or text relevant to the user's query."  # from the model card, for queries
PROMPT_TOKENS = 40  # upper estimate of what the prompt adds to an item with the default instruction


@dataclass(frozen=True)
class SpecialToken:
    """One special token."""

    token: str


@dataclass(frozen=True)
class TextPiece:
    """Text between two special tokens, tokenized as a whole. `text[start:end]` comes from the caller."""

    text: str
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Placeholders:
    """The `rows * columns` placeholder tokens of an image, or of two frames of a video."""

    token: str
    rows: int
    columns: int


Piece = SpecialToken | TextPiece | Placeholders

IMAGE_PLACEHOLDER = "<|image_pad|>"
VIDEO_PLACEHOLDER = "<|video_pad|>"
USER_HEADER = "user\n"
_START, _END = SpecialToken("<|im_start|>"), SpecialToken("<|im_end|>")
_VISION_START, _VISION_END = SpecialToken("<|vision_start|>"), SpecialToken("<|vision_end|>")
SUFFIX: tuple[Piece, ...] = (_END, TextPiece("\n"), _START, TextPiece("assistant\n"))  # follows the user's turn


def complete_instruction(instruction: str | None, default: str) -> str:
    """Strip whitespace, end with punctuation; the default if nothing is left. As in the reference."""
    instruction = (instruction or "").strip()
    if not instruction:
        return default
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else f"{instruction}."


def prefix(instruction: str) -> tuple[Piece, ...]:
    """The pieces before the user's turn. They depend on the instruction only."""
    return (_START, TextPiece(f"system\n{instruction}"), _END, TextPiece("\n"), _START)


def user_turn(
    item: EmbeddingItem,
    grids: Sequence[tuple[int, int, int]],
    seconds: Sequence[Sequence[float]] = (),
    *,
    header: str = USER_HEADER,
    footer: str = "",
) -> tuple[Piece, ...]:
    r"""The pieces from `header` to the end of the caller's content and `footer`; `SUFFIX` follows.

    `grids`: (frames, rows, columns) in tokens of each image and video of the item, in order. `seconds`: of each video,
    the time of each frame. A video is, for each two frames, `<{time} seconds>` and an image of `<|video_pad|>`,
    without a `<|vision_start|>`, `<|vision_end|>` pair around the whole video: so in transformers 4.57, with which the
    checkpoints were published; later versions keep the outer pair.
    """
    pieces: list[Piece] = []
    text, start = header, len(header)
    end = start
    remaining_grids, remaining_seconds = iter(grids), iter(seconds)
    for part in item.parts:
        if isinstance(part, Text):
            text += part.text
            end = len(text)
            continue
        frames, rows, columns = next(remaining_grids)
        times = () if isinstance(part, Image) else next(remaining_seconds)
        for frame in range(frames):
            if not isinstance(part, Image):
                text += f"<{_mean_time(times, frame):.1f} seconds>"
            if text:
                pieces.append(TextPiece(text, start, end))
            token = IMAGE_PLACEHOLDER if isinstance(part, Image) else VIDEO_PLACEHOLDER
            pieces += [_VISION_START, Placeholders(token, rows, columns), _VISION_END]
            text, start, end = "", 0, 0
    text += footer
    if text:
        pieces.append(TextPiece(text, start, end))
    return tuple(pieces)


def _mean_time(times: Sequence[float], pair: int) -> float:
    """Mean time of a pair of frames, as transformers' `_calculate_timestamps`."""
    return (times[2 * pair] + times[2 * pair + 1]) / 2
