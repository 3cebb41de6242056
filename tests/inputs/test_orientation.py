"""Turned and mirrored photos and clips are embedded as a person sees them, unless the operator wants them raw."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from embedder import Embedder
from embedder.inputs.image import load_image
from embedder.inputs.items import Video
from embedder.inputs.orientation import exif_orientation, matrix_orientation, turn_upright, turn_values
from embedder.inputs.regimes import CheckpointRegime
from embedder.inputs.video import load_video
from embedder.settings import Settings
from tests.conftest import encoded, picture
from tests.inputs.test_video import clip

UPRIGHT = picture(96, 160, 3)
INVERSE = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # EXIF's number that undoes each one
MATRICES = {  # EXIF's number -> a, b, c, d of the display matrix
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def photo(number: int, file_format: str = "PNG") -> bytes:
    """`UPRIGHT` as a camera held in another way stores it: turned, with EXIF's number."""
    exif = PIL.Image.Exif()
    exif[0x0112] = number
    stored = turn_upright(UPRIGHT, INVERSE[number])
    options = {"lossless": True} if file_format == "WEBP" else {}
    return encoded(stored, file_format, exif=exif, **options)


def turned_clip(number: int, data: bytes) -> bytes:
    """The MP4 with another display matrix in its track header."""
    box = data.index(b"tkhd")
    start = box + 44
    a, b, c, d = (value << 16 for value in MATRICES[number])
    return data[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[start + 36 :]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize("number", range(1, 9))
def test_photo_gives_the_vector_of_the_upright_one(number: int, file_format: str, embedder: Embedder) -> None:
    vector, upright = embedder.embed([{"image": photo(number, file_format)}, {"image": UPRIGHT}])
    assert np.abs(vector - upright).max() <= 1e-6


@pytest.mark.parametrize("number", range(1, 9))
def test_jpeg_is_turned(number: int) -> None:
    image = PIL.Image.open(io.BytesIO(photo(number, "JPEG")))
    assert exif_orientation(image) == number
    values = load_image(photo(number, "JPEG"), CheckpointRegime(), Settings())
    assert np.array_equal(values, np.asarray(turn_upright(image.convert("RGB"), number)))
    assert values.shape == (160, 96, 3)


def test_frames_of_a_list_are_turned(embedder: Embedder) -> None:
    turned = [photo(6), photo(8), photo(1)]
    vector, upright = embedder.embed([{"video": turned}, {"video": [UPRIGHT] * 3}])
    assert np.abs(vector - upright).max() <= 1e-6


def test_damaged_or_unknown_exif_is_ignored() -> None:
    stored = np.asarray(UPRIGHT)
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
    ):
        values = load_image(encoded(UPRIGHT, "PNG", exif=exif), CheckpointRegime(), Settings())
        assert np.array_equal(values, stored)


def stored_frames(data: bytes) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([np.asarray(frame.to_image()) for frame in container.decode(video=0)])


@pytest.mark.parametrize("number", range(1, 9))
def test_clip_is_turned_as_its_display_matrix_says(number: int) -> None:
    plain = clip(num_frames=4, width=128, height=96)
    loaded = load_video(Video(turned_clip(number, plain)), CheckpointRegime(), Settings())
    expected = np.stack([np.asarray(turn_upright(PIL.Image.fromarray(one), number)) for one in stored_frames(plain)])
    assert np.array_equal(loaded.frames, expected)
    assert loaded.frames.shape[1:3] == ((128, 96) if number >= 5 else (96, 128))


@pytest.mark.parametrize(("degrees", "number"), [(0, 1), (90, 8), (180, 3), (270, 6)])
def test_rotation_written_by_a_muxer_is_undone(degrees: int, number: int) -> None:
    upright = np.asarray(picture(128, 64, 1))
    stored = turn_values(upright, INVERSE[number])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=2, options={"qscale": "1"})
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuvj444p"
        stream.set_display_rotation(degrees)
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = load_video(Video(buffer.getvalue()), CheckpointRegime(), Settings()).frames
    assert frames.shape == (2, 64, 128, 3)
    assert np.abs(frames[0].astype(int) - upright).mean() < 3


def test_matrix_of_an_odd_angle_counts_as_the_nearest() -> None:
    assert [matrix_orientation((*one, 0, 0, 0, 0)) for one in ((9, 2, 0, -2, 9), (2, 9, 0, -9, 2))] == [1, 6]
    assert matrix_orientation((0,) * 9) == 1


def test_arrays_and_images_turn_alike() -> None:
    for number in range(1, 9):
        assert np.array_equal(turn_values(np.asarray(UPRIGHT), number), np.asarray(turn_upright(UPRIGHT, number)))


def test_setting_keeps_the_raw_orientation(random_checkpoint: Path) -> None:
    settings = Settings(raw_orientation=True)
    values = load_image(photo(6), CheckpointRegime(), settings)
    assert np.array_equal(values, np.asarray(turn_upright(UPRIGHT, INVERSE[6])))
    plain = clip(num_frames=2, width=128, height=96)
    loaded = load_video(Video(turned_clip(6, plain)), CheckpointRegime(), settings)
    assert np.array_equal(loaded.frames, stored_frames(plain))
