"""HEIC pictures have the pixels of pi-heif's own decoder, upright, in every form that cameras write."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pi_heif
import PIL.Image
import pillow_heif
import pytest

from embedder.errors import EmbedderError, InvalidMedia, MediaTooLarge
from embedder.inputs.decoder_process import decoder_for_one_item
from embedder.inputs.image import load_image
from embedder.inputs.orientation import turn_upright
from embedder.inputs.regimes import CheckpointRegime
from embedder.settings import Settings
from tests.conftest import encoded, picture
from tests.inputs.heic import Item, grid, heic, hostile_files, tile

REGIME = CheckpointRegime()
SETTINGS = Settings(decode_timeout_s=60)


def load(source: Any, settings: Settings = SETTINGS) -> Any:
    return load_image(source, REGIME, settings)


def reference(data: bytes) -> PIL.Image.Image:
    """The primary picture as pi-heif decodes it without Pillow's plugin."""
    return pi_heif.open_heif(io.BytesIO(data)).to_pillow()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
@pytest.mark.parametrize("options", [{}, {"chroma": 444, "quality": -1}, {"chroma": 420, "quality": 40}], ids=range(3))
def test_picture_has_the_pixels_of_pi_heif(mode: str, options: dict[str, Any]) -> None:
    image = picture(70, 50).convert("RGBA")
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    data = encoded(image.convert(mode), "HEIF", **options)
    assert np.array_equal(load(data), load(reference(data)))


def test_picture_of_10_bits_has_the_pixels_of_pi_heif() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (48, 64, 3), np.uint16)
    buffer = io.BytesIO()
    pillow_heif.encode("RGB;16", (64, 48), values.tobytes(), buffer, quality=-1)
    data = buffer.getvalue()
    assert pi_heif.open_heif(io.BytesIO(data)).info["bit_depth"] == 10
    assert np.array_equal(load(data), load(reference(data)))


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("is_raw", [False, True])
def test_picture_is_upright(orientation: int, is_raw: bool) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()  # the encoder writes the orientation as HEIC has it, too
    options = {"exif": exif.tobytes(), "quality": -1, "chroma": 444}
    pillow_heif.encode("RGB", (64, 48), picture(64, 48).tobytes(), buffer, **options)
    upright = load(turn_upright(picture(64, 48), orientation)).astype(int)
    loaded = load(buffer.getvalue(), Settings(decode_timeout_s=60, raw_orientation=is_raw))
    assert loaded.shape == upright.shape
    assert np.abs(loaded - upright).mean() < 3


def test_primary_picture_of_a_collection_is_used() -> None:
    file = pillow_heif.HeifFile()
    for seed in range(3):
        file.add_from_pillow(picture(64, 48, seed))
    buffer = io.BytesIO()
    file.save(buffer, primary_index=1, quality=-1, chroma=444)
    assert np.abs(load(buffer.getvalue()) - load(picture(64, 48, 1)).astype(int)).mean() < 3


def test_picture_of_tiles_has_the_pixels_of_its_tiles() -> None:
    alone = np.asarray(reference(heic(tile())).convert("RGB"))
    data = heic(grid(3, 2, range(2, 8)), *[tile()] * 6)
    assert np.array_equal(np.asarray(reference(data).convert("RGB")), np.tile(alone, (2, 3, 1)))
    assert np.array_equal(load(data), load(PIL.Image.fromarray(np.tile(alone, (2, 3, 1)))))


def test_picture_of_tiles_that_is_cut_off_is_refused() -> None:
    buffer = io.BytesIO()
    pillow_heif.encode("RGB", (300, 200), picture(300, 200).tobytes(), buffer, tile_size=128)
    data = buffer.getvalue()
    assert load(data).shape
    for length in (len(data) - 1, len(data) - 100, len(data) // 2):
        with pytest.raises(InvalidMedia, match="cut off"):
            load(data[:length])


def _damaged_tiles() -> dict[str, bytes]:
    """Pictures of 2x2 tiles, of which one is damaged or missing."""
    one = tile()
    half, zeros = one.data[: len(one.data) // 2], bytes(len(one.data))
    others = {
        "is empty": Item(one.kind, b"", one.properties),
        "is cut off": Item(one.kind, half, one.properties),
        "is zeros": Item(one.kind, zeros, one.properties),
        "has no configuration": Item(one.kind, one.data, one.properties[1:]),
        "has no size": Item(one.kind, one.data, one.properties[:1]),
    }
    files = {
        f"tile {place} {name}": heic(grid(2, 2, range(2, 6)), *[one] * (place - 1), bad, *[one] * (4 - place))
        for name, bad in others.items()
        for place in (1, 3, 4)
    }
    good = heic(grid(2, 2, range(2, 6)), *[one] * 4)
    location = struct.pack(">II", 12, len(one.data))  # after the grid's own data
    return {
        **files,
        "names 3 tiles": heic(grid(2, 2, range(2, 5)), *[one] * 3),
        "names 5 tiles": heic(grid(2, 2, range(2, 7)), *[one] * 5),
        "names a tile that is not there": heic(grid(2, 2, [2, 3, 4, 9]), *[one] * 3),
        "names no tiles": heic(grid(2, 2, ()), one),
        "tiles are beyond the end": good.replace(location, struct.pack(">II", 2**20, len(one.data))),
        "tiles are longer than the file": good.replace(location, struct.pack(">II", 12, 2**31)),
    }


@pytest.mark.parametrize("name", _damaged_tiles())
def test_picture_of_which_a_tile_is_damaged_or_missing_is_refused(name: str) -> None:
    """libheif would leave its place green, or pi-heif take one of the tiles for the picture."""
    with pytest.raises(InvalidMedia, match=r"cannot be decoded|cannot be read|cut off"):
        load(_damaged_tiles()[name])


def test_color_space_of_an_unknown_number_is_no_damage() -> None:
    known = "".join(f"{number:08b}" for number in (1, 13, 6))  # sRGB, in the configuration of the encoder
    unknown = "".join(f"{number:08b}" for number in (200, 200, 6))
    one = tile()
    config = one.properties[0]
    bits = f"{int.from_bytes(config):0{8 * len(config)}b}"
    assert bits.count(known) == 1
    one.properties[0] = int(bits.replace(known, unknown), 2).to_bytes(len(config))
    assert np.array_equal(load(heic(one)), load(heic(tile())))


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("compatible", [b"heicavif", b"avifheic"])
def test_content_decides_between_heic_and_avif(kind: str, compatible: bytes) -> None:
    """The brand `mif1` does not say which it is, and a file may claim both."""
    data = encoded(picture(64, 48), kind)
    general = data[:8] + b"mif1" + data[12:16] + compatible + data[24:]
    assert np.array_equal(load(general), load(data))


def test_limit_of_pixels_applies() -> None:
    with pytest.raises(MediaTooLarge, match="1001x1000 = 1001000 pixels"):
        load(encoded(PIL.Image.new("RGB", (1001, 1000)), "HEIF"), Settings(max_image_pixels=1_000_000))


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile_files())
def test_hostile_file_gives_a_picture_or_an_error_in_time(name: str) -> None:
    settings = Settings(decode_timeout_s=5)
    with decoder_for_one_item(settings) as decoder:
        try:
            load_image(hostile_files()[name], REGIME, settings, decoder=decoder)
        except EmbedderError as error:
            print(name, error)
        load_image(encoded(picture(64, 48), "HEIF"), REGIME, settings, decoder=decoder)
