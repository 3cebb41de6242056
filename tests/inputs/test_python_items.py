"""Items of Python programs, in every form that is the same item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from embedder.errors import InvalidMedia, InvalidRequest
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.python_items import PythonItem, is_single_item, item_from_python
from tests.conftest import encoded, picture
from tests.inputs.test_video import clip

PHOTO = picture(40, 30)


def part_of(item: PythonItem) -> Any:
    (part,) = item_from_python(item, None, None).parts
    return part


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "photo"  # the content says what it is, not a suffix
    path.write_bytes(encoded(PHOTO))
    return path


def test_path_is_the_content_of_its_file(png: Path) -> None:
    assert part_of(png) == part_of({"image": png}) == Image(png.read_bytes())
    assert part_of({"content": [{"type": "image", "image": png}]}) == Image(png.read_bytes())


def test_path_of_a_clip_is_a_video(tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(clip())
    assert part_of(path) == part_of({"video": path}) == Video(path.read_bytes())


def test_text_that_looks_like_a_path_is_a_text(png: Path) -> None:
    assert part_of(str(png)) == Text(str(png))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_array_is_the_image_with_these_pixels(mode: str) -> None:
    image = PHOTO.convert(mode)
    for part in (part_of(np.asarray(image)), part_of({"image": np.asarray(image)})):
        assert isinstance(part, Image)
        assert isinstance(part.source, PIL.Image.Image)
        assert (part.source.mode, part.source.tobytes()) == (mode, image.tobytes())


def test_array_with_four_axes_is_a_list_of_frames() -> None:
    frames = np.stack([np.asarray(picture(40, 30, seed)) for seed in range(3)])
    part = part_of({"video": frames})
    assert isinstance(part, Video)
    assert np.array_equal(np.stack([np.asarray(frame) for frame in part.source]), frames)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 5, 5), np.uint8),
        np.zeros((4, 4, 3, 1, 1), np.uint8),
        np.zeros(16, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
def test_array_that_is_not_an_image_is_refused_with_its_shape(array: Any) -> None:
    with pytest.raises(InvalidMedia, match=r"^array of shape \(.*\) and type .*; allowed: uint8 values"):
        part_of(array)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidMedia, match=r"^cannot read .*none\.png: No such file or directory"):
        part_of(tmp_path / "none.png")
    with pytest.raises(InvalidMedia, match="Is a directory"):
        part_of({"image": tmp_path})


def test_options_of_the_call_apply_to_items_without_their_own() -> None:
    for item in ("red", PHOTO, np.asarray(PHOTO), {"text": "red"}):
        assert item_from_python(item, "Find.", 64).instruction == "Find."
    own = item_from_python({"text": "red", "instruction": "Own."}, "Find.", 64)
    assert (own.instruction, own.dimensions) == ("Own.", 64)


def test_other_types_are_refused_with_those_that_are_allowed() -> None:
    with pytest.raises(InvalidRequest, match=r"^got int; allowed: a text, a path"):
        part_of(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "item",
    ["red", b"red", Path("red.png"), PHOTO, np.asarray(PHOTO), {"text": "red"}, EmbeddingItem((Text("red"),))],
    ids=lambda item: type(item).__name__,
)
def test_one_item_is_told_from_a_list_of_items(item: Any) -> None:
    assert is_single_item(item)
    assert not is_single_item([item])
    assert not is_single_item(iter([item]))
    assert not is_single_item(np.zeros((2, 4, 4, 3), np.uint8))
