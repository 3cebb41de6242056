"""The pieces of a prompt joined are what the checkpoint's chat template renders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3VLProcessor

from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.prompt import SUFFIX, Piece, Placeholders, TextPiece, complete_instruction, prefix, user_turn

GRID = (1, 2, 3)


@pytest.fixture(scope="module")
def processor(random_checkpoint: Path) -> Any:
    return Qwen3VLProcessor.from_pretrained(random_checkpoint)


def written(pieces: Sequence[Piece]) -> str:
    """The prompt as text, one placeholder for a picture."""
    return "".join(piece.text if isinstance(piece, TextPiece) else piece.token for piece in pieces)


def caller_text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text[piece.start : piece.end] for piece in pieces if isinstance(piece, TextPiece))


@pytest.mark.parametrize(
    "parts",
    [
        (Text("red"),),
        (Text("\n\n  red \n"),),
        (Text("a"), Text("b")),
        (Text(""), Image("")),
        (Image(""),),
        (Image(""), Image("")),
        (Image(""), Text("a")),
        (Text("a"), Image(""), Text("b\n"), Image(""), Text("c"), Text("d")),
    ],
)
@pytest.mark.parametrize("instruction", ["Represent the user's input.", "Zwei\nZeilen.", "{{ braces }}"])
def test_pieces_are_what_the_chat_template_renders(
    parts: tuple[Text | Image, ...], instruction: str, processor: Any
) -> None:
    content = [{"type": "text", "text": one.text} if isinstance(one, Text) else {"type": "image"} for one in parts]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": instruction}]},
        {"role": "user", "content": content},
    ]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    grids = [GRID for one in parts if isinstance(one, Image)]
    pieces = (*prefix(instruction), *user_turn(EmbeddingItem(parts), grids), *SUFFIX)
    assert written(pieces) == rendered
    assert caller_text(pieces) == "".join(one.text for one in parts if isinstance(one, Text))
    assert TextPiece("") not in pieces


@pytest.mark.parametrize(("num_frames", "fps"), [(2, 2.0), (6, 2.0), (6, 1.0), (8, 3.0)])
def test_video_is_timestamped_frames_without_an_outer_pair_of_tokens(
    num_frames: int, fps: float, processor: Any
) -> None:
    timestamps = processor._calculate_timestamps(list(range(num_frames)), fps)
    frames = "".join(f"<{time:.1f} seconds><|vision_start|><|video_pad|><|vision_end|>" for time in timestamps)
    item = EmbeddingItem((Text("a "), Video(("",) * num_frames, fps), Text(" b")))
    pieces = user_turn(item, [(num_frames // 2, 2, 2)], [[index / fps for index in range(num_frames)]])
    assert written(pieces) == f"user\na {frames} b"
    assert caller_text(pieces) == "a  b"  # of the timestamps nothing may be cut


def test_placeholders_have_the_size_of_their_grid() -> None:
    item = EmbeddingItem((Image(""), Video(("",) * 4), Image("")))
    pieces = user_turn(item, [(1, 2, 3), (2, 4, 5), (1, 6, 7)], [(0.0, 0.5, 1.0, 1.5)])
    placeholders = [piece for piece in pieces if isinstance(piece, Placeholders)]
    image, video = "<|image_pad|>", "<|video_pad|>"
    assert placeholders == [
        Placeholders(image, 2, 3),
        Placeholders(video, 4, 5),
        Placeholders(video, 4, 5),
        Placeholders(image, 6, 7),
    ]


def test_special_tokens_in_a_text_stay_inside_its_piece() -> None:
    pieces = user_turn(EmbeddingItem((Text("a<|im_end|>\n<|im_start|>system\n"),)), [])
    assert pieces == (TextPiece("user\na<|im_end|>\n<|im_start|>system\n", start=5, end=36),)


@pytest.mark.parametrize(
    ("given", "complete"),
    [
        (None, "Default."),
        ("", "Default."),
        (" \n\t", "Default."),
        ("Find", "Find."),
        ("  Find \n", "Find."),
        ("Find.", "Find."),
        ("Find!", "Find!"),  # Unicode category Po
        ("Find (all)", "Find (all)"),  # Pe
        ("Find -", "Find -"),  # Pd
        ("Find _", "Find _"),  # Pc
        ("Find \u201d", "Find \u201d"),  # Pf
        ("\u67e5\u627e\u3002", "\u67e5\u627e\u3002"),  # an ideographic full stop, Po
        ("Find 1", "Find 1."),
        ("Find $", "Find $."),  # Sc
        ("Find +", "Find +."),  # Sm
        ("Find `", "Find `."),  # Sk
        ("Find \U0001f7e5", "Find \U0001f7e5."),  # So
        ("cafe\u0301", "cafe\u0301."),  # Mn
        ("Find . ", "Find ."),
    ],
)
def test_instruction_is_stripped_and_ends_with_punctuation(given: str | None, complete: str) -> None:
    """The rule of the reference: a full stop unless the last character's category starts with P."""
    assert complete_instruction(given, "Default.") == complete
