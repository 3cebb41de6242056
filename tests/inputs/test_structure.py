"""Ordinary pictures are decoded in a thread; what could hold it, or the interpreter, needs a process."""

from __future__ import annotations

import io
import random
import struct
import time
from typing import Any

import PIL.Image
import pytest

from embedder.inputs.decoder import THREAD_BYTES, NeedsProcess, ThreadDecoder
from embedder.inputs.structure import is_bounded
from embedder.settings import Settings
from tests.conftest import encoded, picture
from tests.inputs.hostile import avif_of, avif_of_frames, chunk, gif_of_comments, jpeg_of_scans, png, rle_bmp

SETTINGS = Settings()
JPEG = encoded(picture(64, 48), "JPEG")
PNG = encoded(picture(64, 48), "PNG")


def needed(data: bytes) -> int | None:
    """Bytes of memory that a process needs for the picture, 0 if not known; None if a thread may decode it."""
    try:
        ThreadDecoder().open_image(data, SETTINGS, time.monotonic() + 60)
    except NeedsProcess as need:
        return need.num_bytes
    return None


def segments(count: int, num_bytes: int = 2, kind: bytes = b"\xfe", start: bytes = b"") -> bytes:
    return (b"\xff" + kind + struct.pack(">H", num_bytes) + start.ljust(num_bytes - 2, b"\0")) * count


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("JPEG", {"restart_marker_rows": 1}),
        ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(60_000), "icc_profile": bytes(200_000)}),
        ("PNG", {}),
        ("PNG", {"compress_level": 0}),
        ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(60_000)}),
        ("WEBP", {"save_all": True, "append_images": [picture(1200, 900)] * 3}),
        ("GIF", {}),
        ("GIF", {"save_all": True, "append_images": [picture(1200, 900).convert("L")] * 3, "comment": b"a" * 1000}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_ordinary_picture_is_decoded_in_a_thread(file_format: str, options: dict[str, Any]) -> None:
    noise = PIL.Image.effect_noise((1200, 900), 100)
    data = encoded(noise if file_format == "GIF" else noise.convert("RGB"), file_format, **options)
    assert is_bounded(data)
    assert needed(data) is None
    assert needed(data + b"\xff\xda\0\2" * 1000) is None  # what follows the picture does not count


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"subsampling": "4:4:4", "quality": 100}, id="of all colors"),
        pytest.param({"tile_rows": 2, "tile_cols": 2}, id="of tiles"),
        pytest.param({"exif": b"MM\0*\0\0\0\x08\0\0" + bytes(60_000), "xmp": bytes(9_000)}, id="of EXIF and XMP"),
        pytest.param({"icc_profile": bytes(50_000)}, id="of a color profile"),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_still_avif_is_decoded_in_a_thread(options: dict[str, Any], mode: str) -> None:
    image = PIL.Image.effect_noise((1200, 900), 100).convert(mode)
    if mode == "RGBA":
        image.putalpha(picture(1200, 900).convert("L"))
    assert needed(encoded(image, "AVIF", speed=10, **options)) is None


STILL = encoded(picture(64, 48), "AVIF")
SIZE = struct.pack(">II", 64, 48)
ALPHA = PIL.Image.merge("RGBA", (*picture(64, 48).split(), picture(64, 48).convert("L")))


def set_bits(coded: bytes, bits: int) -> bytes:
    """Change the first byte of the sequence header: still_picture is bit 4, reduced_still_picture_header bit 3."""
    return coded[:4] + bytes([coded[4] ^ bits]) + coded[5:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(avif_of_frames(picture(64, 48), 2), id="two frames in a picture"),
        pytest.param(avif_of_frames(picture(64, 48), 5_000), id="5,000 frames in a picture"),
        pytest.param(
            encoded(picture(64, 48), "AVIF", save_all=True, append_images=[picture(64, 48, 1)]), id="a sequence"
        ),
        pytest.param(STILL.replace(SIZE, struct.pack(">II", 16, 16)), id="a frame larger than the declared size"),
        pytest.param(STILL.replace(SIZE, struct.pack(">II", 6400, 4800)), id="a frame smaller than the declared size"),
        pytest.param(avif_of(picture(64, 48), lambda coded: set_bits(coded, 0x10)), id="not a still picture"),
        pytest.param(avif_of(picture(64, 48), lambda coded: set_bits(coded, 0x08)), id="a full sequence header"),
        pytest.param(
            avif_of(picture(64, 48), lambda coded: coded[:2] + coded[2:13] * 2 + coded[13:]), id="two headers"
        ),
        pytest.param(avif_of(picture(64, 48), lambda coded: coded[:13]), id="no frame"),
        pytest.param(avif_of(picture(64, 48), lambda coded: b"\x12\0" * 100 + coded), id="many units"),
        pytest.param(avif_of(picture(64, 48), lambda coded: b"\x3a\0" + coded), id="a unit of an unknown kind"),
        pytest.param(avif_of(picture(64, 48), lambda coded: b"\x16\0\0" + coded), id="a unit of a layer"),
        pytest.param(avif_of(picture(64, 48), lambda coded: coded[:3] + b"\xff" * 9 + coded[4:]), id="an endless size"),
        pytest.param(STILL.replace(b"av01Color", b"gridColor"), id="a grid"),
        pytest.param(STILL.replace(b"pixi", b"a1lx"), id="layers"),
        pytest.param(STILL.replace(b"av1C", b"pasp"), id="no codec"),
        pytest.param(STILL.replace(b"iloc", b"free"), id="no places"),
        pytest.param(STILL[:-1], id="cut off"),
        pytest.param(STILL + bytes(8), id="zeros at the end"),
        pytest.param(STILL + struct.pack(">I4s", 8, b"moov"), id="a movie too"),
        pytest.param(STILL + STILL, id="two files"),
        pytest.param(encoded(picture(64, 48), "AVIF", exif=b"II*\0\x08\0\0\0" + bytes(2**17)), id="much EXIF"),
        pytest.param(encoded(picture(64, 48), "AVIF", icc_profile=bytes(2**16)), id="a large color profile"),
        pytest.param(encoded(ALPHA, "AVIF").replace(SIZE, struct.pack(">II", 64, 47)), id="alpha of another size"),
    ],
)
def test_other_avif_needs_a_process(data: bytes) -> None:
    assert not is_bounded(data)
    assert needed(data) == 0


def test_still_avif_with_any_byte_changed_is_checked_without_an_error() -> None:
    draw = random.Random(0)
    still = encoded(ALPHA, "AVIF", exif=b"II*\0\x08\0\0\0")
    for _ in range(3_000):
        data = bytearray(still)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        is_bounded(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))


def test_motion_photo_is_decoded_in_a_thread() -> None:
    assert needed(JPEG + JPEG + bytes(1_000_000)) is None


def with_exif(file_format: str, num_entries: int) -> bytes:
    """A picture with EXIF metadata of many entries, which Pillow reads in Python."""
    entries = b"".join(struct.pack("<HHII", 1 + number % 60_000, 3, 1, 1) for number in range(num_entries))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", num_entries) + entries + bytes(4)
    return encoded(picture(64, 48), file_format, exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(with_exif("PNG", 60_000), id="PNG of many EXIF entries"),
        pytest.param(with_exif("WEBP", 60_000), id="WebP of many EXIF entries"),
        pytest.param(JPEG[:2] + segments(3, 65_000, b"\xe1", b"Exif") + JPEG[2:], id="JPEG of a large EXIF"),
        pytest.param(png(64, 64, more=chunk(b"zTXt", b"Raw profile type exif\0\0x")), id="PNG of EXIF as text"),
        pytest.param(gif_of_comments(picture(64, 48)), id="GIF of many comments"),
        pytest.param(encoded(picture(64, 48), "GIF")[:20], id="GIF without a picture"),
        pytest.param(rle_bmp(640, 480), id="RLE BMP"),
        pytest.param(png(64, 64, more=chunk(b"tEXt", b"a\0b") * 1000), id="PNG of many chunks"),
        pytest.param(png(64, 64, more=chunk(b"zzzz", b"") * 1000), id="PNG of empty chunks of an unknown kind"),
        pytest.param(PNG[:-12] + chunk(b"IDAT", b"") * 1000 + PNG[-12:], id="PNG of many chunks of pixels"),
        pytest.param(PNG[:-12] + chunk(b"tEXt", b"a\0b") * 1000 + PNG[-12:], id="PNG of many chunks at the end"),
        pytest.param(JPEG[:2] + segments(1000) + JPEG[2:], id="JPEG of many comments"),
        pytest.param(JPEG[:2] + segments(1000, 8, b"\xed") + JPEG[2:], id="JPEG of many Photoshop segments"),
        pytest.param(JPEG[:2] + segments(100, 65_000, b"\xe1") + JPEG[2:], id="JPEG of a large header"),
        pytest.param(JPEG[:-2] + segments(1000) + JPEG[-2:], id="JPEG of many comments at the end"),
        pytest.param(jpeg_of_scans(picture(64, 64), 40), id="JPEG of many scans"),
        pytest.param(JPEG[:40], id="JPEG without a scan"),
        *(pytest.param(encoded(picture(64, 48), kind), id=kind) for kind in ("TIFF", "ICO", "HEIF")),
    ],
)
def test_picture_that_could_hold_the_interpreter_needs_a_process(data: bytes) -> None:
    assert not is_bounded(data)
    assert needed(data) == 0


@pytest.mark.parametrize("size", [10**5, 2 * 10**7])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "AVIF"])
def test_structure_of_any_file_is_checked_in_a_bounded_time(kind: str, size: int) -> None:
    start = {"JPEG": JPEG[:2], "PNG": PNG[:8], "GIF": b"GIF89a" + bytes(7), "AVIF": STILL[:32]}[kind]
    for repeated in (
        b"\xff\xfe\0\2",
        b"!\xfe\0",
        chunk(b"tEXt", b""),
        b"\xff\xda\0\2",
        random.Random(0).randbytes(1000),
    ):
        data = start + repeated * (size // len(repeated))
        begin = time.thread_time()
        is_bounded(data)
        assert time.thread_time() - begin < 0.2


@pytest.mark.parametrize(
    ("file_format", "options", "megapixels"),
    [
        ("JPEG", {}, 18),
        ("JPEG", {"progressive": True, "subsampling": 2}, 13),
        ("WEBP", {}, 7),
        ("AVIF", {"speed": 10}, 6),
        ("PNG", {}, 18),
    ],
)
def test_large_picture_needs_a_process_with_its_memory(
    file_format: str, options: dict[str, Any], megapixels: int
) -> None:
    data = io.BytesIO()
    PIL.Image.new("RGB", (1000 * megapixels, 1000)).save(data, file_format, **options)
    num_bytes = needed(data.getvalue())
    assert num_bytes is not None
    assert THREAD_BYTES < num_bytes < 30_000_000 * megapixels


def test_clip_always_needs_a_process() -> None:
    with pytest.raises(NeedsProcess):
        ThreadDecoder().open_clip(b"GIF89a", SETTINGS, time.monotonic() + 60)
