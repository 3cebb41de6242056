"""Images decode to the reference's pixels; other bytes are refused with an error that names what they are."""

from __future__ import annotations

import base64
import io
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from qwen_vl_utils.vision_process import fetch_image

from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.image import load_image
from embedder.inputs.orientation import turn_upright
from embedder.inputs.regimes import CheckpointRegime, ReferenceRegime, Regime
from embedder.settings import Settings
from tests.conftest import ROOT, encoded, picture
from tests.inputs.hostile import chunk, jpeg_of_scans, png

SETTINGS = Settings(max_image_pixels=1_000_000, max_image_bytes=200_000)
CHECKPOINT, REFERENCE, SMALL = CheckpointRegime(), ReferenceRegime(), ReferenceRegime(max_pixels=16_384)


def load(source: Any, regime: Regime = REFERENCE) -> NDArray[np.uint8]:
    return load_image(source, regime, SETTINGS)


def reference(image: PIL.Image.Image, regime: Regime = REFERENCE) -> NDArray[np.uint8]:
    sizes = {"min_pixels": regime.min_pixels, "max_pixels": regime.max_pixels}
    return np.asarray(fetch_image({"image": image, **sizes}, image_patch_size=16))


def with_alpha(width: int = 40, height: int = 36) -> PIL.Image.Image:
    image = picture(width, height).convert("RGBA")
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    return image


# Values


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47), (2, 3), (300, 20), (500, 701), (9, 400)])
@pytest.mark.parametrize("regime", [REFERENCE, SMALL])
def test_resized_values_are_the_references_bit_for_bit(size: tuple[int, int], regime: Regime) -> None:
    image = picture(*size)
    assert np.array_equal(load(encoded(image), regime), reference(image, regime))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_every_mode_is_as_in_the_reference(mode: str) -> None:
    image = with_alpha() if mode == "RGBA" else picture(40, 36).convert(mode)
    assert np.array_equal(load(image), reference(image))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("BMP", {}), ("GIF", {}), ("JPEG", {"quality": 90}), ("JPEG", {"progressive": True}), ("WEBP", {})],
)
def test_every_format_is_as_in_the_reference(file_format: str, options: dict[str, Any]) -> None:
    data = encoded(picture(50, 70), file_format, **options)
    assert np.array_equal(load(data), reference(PIL.Image.open(io.BytesIO(data))))


def test_cmyk_jpeg_is_as_in_the_reference() -> None:
    data = encoded(picture(50, 70).convert("CMYK"), "JPEG")
    assert PIL.Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.array_equal(load(data), reference(PIL.Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white_as_in_the_reference(file_format: str) -> None:
    data = encoded(with_alpha(), file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    assert np.array_equal(load(data), reference(PIL.Image.open(io.BytesIO(data))))
    clear = PIL.Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    assert (load(encoded(clear, file_format)) == 255).all()


def test_every_transparent_mode_is_composited_on_white() -> None:
    """The reference drops their transparency. Here the same image gives the same pixels in every mode."""
    gray = PIL.Image.new("LA", (64, 64), (40, 0))
    palette = PIL.Image.new("P", (64, 64), 0)
    palette.putpalette([9, 9, 9])
    with_palette_alpha = encoded(palette, "PNG", transparency=b"\x00")
    keyed = encoded(PIL.Image.new("RGB", (64, 64), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    gif = encoded(palette, "GIF", transparency=0)
    for source in (encoded(gray), palette.convert("PA"), with_palette_alpha, keyed, gif):
        if isinstance(source, PIL.Image.Image):
            source.putalpha(0)
        assert (load(source) == 255).all()
    assert (load(encoded(palette)) == 9).all()


def test_half_transparent_gray_is_half_way_to_white() -> None:
    # 128 / 255 of 40 on white: 40 * 0.502 + 255 * 0.498 = 147.1
    assert (abs(load(PIL.Image.new("LA", (64, 64), (40, 128))).astype(int) - 147) <= 1).all()


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    loaded = load(encoded(PIL.Image.fromarray(values)))
    assert np.array_equal(loaded, np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2))


def test_transparent_value_of_16_bit_gray_becomes_white() -> None:
    values = np.full((64, 64), 5140, np.uint16)  # 20 of 255
    values[:, :32] = 1000
    loaded = load(encoded(PIL.Image.fromarray(values), transparency=1000))
    assert (loaded[:, :32] == 255).all()
    assert (loaded[:, 32:] == 20).all()


def test_16_bit_color_keeps_its_upper_byte() -> None:
    row = b"\x00" + struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF) * 64
    assert (load(png(64, 64, row * 64, bit_depth=16)) == (0x12, 0x80, 0xFF)).all()


def test_of_an_animation_the_first_frame_is_used() -> None:
    frames = [PIL.Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
    for file_format in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
        assert getattr(PIL.Image.open(io.BytesIO(data)), "n_frames", 1) == 3
        assert (abs(load(data).astype(int) - (255, 0, 0)) < 8).all()  # WebP is lossy


# Base64


def test_base64_in_short_lines_costs_little_memory() -> None:
    text = "AB\n" * 3_000_000
    tracemalloc.start()
    try:
        with pytest.raises(
            InvalidMedia, match=r"^image: not a JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, ICO or HEIC file \(starts with"
        ):
            load_image(text, CHECKPOINT, SETTINGS.model_copy(update={"max_image_bytes": len(text)}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(text)  # a list of the lines would be 20 times as large


def test_every_form_of_base64_gives_the_same_image() -> None:
    data = encoded(picture(40, 40))
    text = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    expected = load(data)
    for form in (text, lines, lines.replace("\n", "\r\n"), f"data:image/png;base64,{text}", f"data:;base64,{text}"):
        assert np.array_equal(load(form), expected)
    # the media type of the data URI is ignored
    assert np.array_equal(load(f"data:image/jpeg;charset=x;base64,{text}"), expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "image is empty (0 bytes)"),
        (b"", "image is empty (0 bytes)"),
        ("data:image/png;base64,", "image is empty (0 bytes)"),
        ("data:image/png,abc", "image is a data URI without base64: 'data:image/png'; allowed: data:..;base64,"),
        (
            "data:image/png;base64",
            "image is a data URI without base64: 'data:image/png;base64'; allowed: data:..;base64,",
        ),
    ],
)
def test_empty_source_and_data_uri_without_base64_are_refused(source: Any, message: str) -> None:
    with pytest.raises(InvalidMedia) as caught:
        load(source)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "https://example.com/a.png",
        "../x.png",
        "not base64!",
        "AAAAA",
        "AAA",
        "AA-_",
        "\u00e9\u00e9",
        "\ud800AAA",
    ],
)
def test_text_that_is_not_base64_is_refused_and_not_opened_as_a_path(text: str) -> None:
    with pytest.raises(InvalidMedia, match=r"^image(: not a JPEG| is not valid base64 \()"):
        load(text)


def test_path_of_an_existing_image_is_not_opened(tmp_path: Any) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(40, 40)))
    for form in (str(path), path.as_uri()):
        with pytest.raises(InvalidMedia):
            load(form)


# What is refused

MP4 = b"\x00\x00\x00\x20ftypisom" + b"\x00" * 100


@pytest.mark.parametrize(
    ("data", "description"),
    [
        (b"%PDF-1.7\n" + b"x" * 100, "a PDF document"),
        (encoded(picture(40, 40), "PDF"), "a PDF document"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "an SVG drawing"),
        (b'\n <?xml version="1.0"?><svg/>', "an XML or SVG document"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (MP4, "an MP4 video"),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "an AVI video"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm" + b"x" * 100, "a WebM video"),
        (b"\x1aE\xdf\xa3" + b"x" * 100, "a Matroska video"),
        (b"PK\x03\x04" + b"x" * 100, "a ZIP archive or office document"),
        (b"just words", ""),
        (b"\x00", ""),
    ],
)
def test_bytes_of_another_format_are_named_in_the_error(data: bytes, description: str) -> None:
    with pytest.raises(InvalidMedia) as caught:
        load(data)
    found_instead = f", but {description}" if description else ""
    start = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data[:12])
    assert str(caught.value) == (
        f"image: not a JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, ICO or HEIC file{found_instead} (starts with {start!r})"
    )


@pytest.mark.parametrize("file_format", ["PPM", "TGA", "PCX", "DDS", "SGI", "JPEG2000"])
def test_other_formats_that_pil_reads_are_refused(file_format: str) -> None:
    with pytest.raises(
        InvalidMedia, match=r"^image: not a JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, ICO or HEIC file \(starts with"
    ):
        load(encoded(picture(32, 32), file_format))


@pytest.mark.parametrize(
    "start",
    [b"\0\0\0\x1cftypavif", b"\0\0\0\x1cftypmif1\0\0\0\0miafavif", b"II*\0"]
    + [b"\0\0\0\x1cftyp" + brand + b"\0\0\0\0miafheic" for brand in (b"heic", b"heix", b"hevc", b"hevm", b"mif1")],
)
def test_file_of_an_allowed_format_that_cannot_be_read_says_so(start: bytes) -> None:
    with pytest.raises(InvalidMedia, match=r"^image: an? (AVIF|TIFF|HEIC) image that is damaged, or of a variant"):
        load(start + bytes(60))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_has_the_pixels_of_the_same_png(mode: str, compression: str | None) -> None:
    image = with_alpha() if mode == "RGBA" else picture(40, 36)
    gray = PIL.Image.fromarray(np.arange(1440, dtype=np.uint16).reshape(36, 40) * 40)
    image = gray if mode == "I;16" else image.convert(mode)
    png = encoded(image.convert("RGB") if mode == "CMYK" else image)
    assert np.array_equal(
        load(encoded(image, "TIFF", **({"compression": compression} if compression else {}))), load(png)
    )


def test_only_the_first_page_of_a_tiff_is_used() -> None:
    pages = [picture(40, 36, seed) for seed in range(3)]
    assert np.array_equal(load(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])), load(pages[0]))


@pytest.mark.parametrize("bitmap_format", ["png", "bmp"])
def test_largest_picture_of_an_icon_is_used(bitmap_format: str) -> None:
    icon = encoded(with_alpha(64, 64), "ICO", sizes=[(16, 16), (64, 64), (32, 32)], bitmap_format=bitmap_format)
    assert np.array_equal(load(icon), load(encoded(with_alpha(64, 64))))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.IcoImagePlugin")
def test_limits_apply_to_the_real_size_of_an_icon() -> None:
    def icon(width: int, height: int) -> bytes:
        data = encoded(PIL.Image.new("RGB", (width, height), "red"))
        return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(data), 22) + data

    assert np.array_equal(load(icon(50, 40)), load(PIL.Image.new("RGB", (50, 40), "red")))
    with pytest.raises(MediaTooLarge, match="1001x1000 = 1001000 pixels"):
        load(icon(1001, 1000))


@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
def test_avif_and_tiff_are_upright(orientation: int) -> None:
    image = picture(64, 48)
    upright = load(turn_upright(image, orientation)).astype(int)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes()
    assert np.array_equal(load(encoded(image, "TIFF", exif=data)), upright)
    assert np.abs(load(encoded(image, "AVIF", quality=95, exif=data)) - upright).mean() < 3


def test_transparent_avif_is_composited_on_white() -> None:
    image = with_alpha(64, 64)
    assert np.abs(load(encoded(image, "AVIF", quality=95)) - load(encoded(image)).astype(int)).mean() < 3


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what the cut-off end of a TIFF held
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "AVIF", "TIFF", "ICO", "HEIF"])
def test_image_cut_off_anywhere_is_refused(file_format: str) -> None:
    data = encoded(picture(64, 48), file_format)
    last = len(data) - (20 if file_format == "PNG" else 2)  # without its end marker an image is still complete
    for length in {*range(1, 40), *range(40, last, max(1, last // 60))}:
        with pytest.raises(InvalidMedia):
            load(data[:length])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # decoded in a process without a log
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.IcoImagePlugin")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "AVIF", "TIFF", "ICO", "HEIF"])
def test_damaged_bytes_give_an_image_or_an_error_and_no_warning(file_format: str) -> None:
    data = encoded(picture(48, 48).convert("P") if file_format == "GIF" else picture(48, 48), file_format)
    generator = random.Random(2)
    num_refused = 0
    for _ in range(120):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 3])):
            damaged[generator.randrange(min(len(data), 300))] = generator.randrange(256)
        try:
            assert load(bytes(damaged)).dtype == np.uint8
        except (InvalidMedia, MediaTooLarge):
            num_refused += 1
    assert num_refused


def test_image_with_a_side_of_one_pixel_is_refused() -> None:
    with pytest.raises(InvalidMedia, match=r"^image of 1x1 pixels; allowed: at least 2 on each side$"):
        load(encoded(picture(1, 1)))
    with pytest.raises(InvalidMedia, match=r"^image of 100x1 pixels; allowed: at least 2 on each side$"):
        load(picture(100, 1))
    assert load(encoded(picture(2, 2))).shape == (64, 64, 3)  # the least that min_pixels of 4096 allows


def test_aspect_ratio_of_500_is_refused_after_decoding_the_header() -> None:
    with pytest.raises(
        InvalidMedia, match=r"^image of 2x1000 pixels has an aspect ratio of 500:1; allowed: up to 200:1$"
    ):
        load(encoded(picture(2, 1000)))


@pytest.mark.parametrize("side", [30_000, 13_000, 1001])
def test_too_many_pixels_are_refused_by_the_header(side: int) -> None:
    """Without PIL's warning, which would be an error here; PIL's limits are 89 and 179 million pixels."""
    with pytest.raises(
        MediaTooLarge,
        match=f"{side * side}.* pixels.*; allowed: up to 1000000( pixels)? \\(EMBEDDER_MAX_IMAGE_PIXELS\\)$",
    ):
        load(png(side, side))  # decoding would raise InvalidMedia: the file has no pixels


def test_pixels_at_the_limit_are_allowed() -> None:
    assert load(encoded(PIL.Image.new("RGB", (1000, 1000)))).shape == (992, 992, 3)


def test_pil_image_has_the_same_limit() -> None:
    with pytest.raises(
        MediaTooLarge,
        match=r"^image of 1001x1000 = 1001000 pixels; allowed: up to 1000000 \(EMBEDDER_MAX_IMAGE_PIXELS\)$",
    ):
        load(PIL.Image.new("RGB", (1001, 1000)))


def test_too_many_bytes_are_refused_in_every_form() -> None:
    data = encoded(picture(40, 40)) + b"\x00" * 200_000
    message = r"^image of (about )?\d+ bytes; allowed: up to 200000 \(EMBEDDER_MAX_IMAGE_BYTES\)$"
    with pytest.raises(MediaTooLarge, match=message):
        load(data)
    with pytest.raises(MediaTooLarge, match=message):
        load(base64.b64encode(data).decode())
    exact = data[:200_000]
    assert load(exact).shape == load(base64.b64encode(exact).decode()).shape == (64, 64, 3)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_gray_of_a_pil_image_is_refused_because_its_range_is_unknown(mode: str) -> None:
    with pytest.raises(
        InvalidMedia, match=f"^image of mode {mode}, whose value range is unknown; allowed: 8 bits, or 16"
    ):
        load(picture(40, 40).convert(mode))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "ICO", "HEIF"])
def test_decoding_ends_at_the_deadline(file_format: str) -> None:
    data = encoded(picture(40, 40), file_format)
    load_image(data, CHECKPOINT, Settings(decode_timeout_s=60))
    with pytest.raises(
        MediaTooLarge,
        match=r"^decoding took more than 0.5 s \(EMBEDDER_DECODE_TIMEOUT_S\); send smaller or fewer images$",
    ):
        load_image(data, CHECKPOINT, Settings(decode_timeout_s=0.5), deadline=time.monotonic())


def test_file_of_a_million_chunks_ends_at_the_deadline() -> None:
    data = png(64, 64, more=chunk(b"tEXt", b"a\0b") * 1_000_000)
    start = time.thread_time()
    with pytest.raises((MediaTooLarge, InvalidMedia)):
        load_image(data, CHECKPOINT, Settings(decode_timeout_s=0.2))
    assert time.thread_time() - start < 2


def test_progressive_jpeg_has_at_most_100_scans() -> None:
    image = picture(64, 64)
    num_own = jpeg_of_scans(image, 0).count(b"\xff\xda")
    load(jpeg_of_scans(image, 100 - num_own))
    with pytest.raises(MediaTooLarge, match=r"^JPEG image of more than 100 scans; allowed: up to 100$"):
        load(jpeg_of_scans(image, 101 - num_own))


def test_warning_filters_are_restored() -> None:
    before = list(warnings.filters)
    load(encoded(picture(40, 40)))
    assert warnings.filters == before


PEAK = """
import io, sys, PIL.Image
from embedder.inputs.picture import decode_image, decode_peak_bytes, open_image
from embedder.inputs.limits import FixedLimits
data = open(sys.argv[1], "rb").read()
limits = FixedLimits(2**27, 10**8, 2**27, 60.0, False)
small = io.BytesIO()
PIL.Image.new("RGB", (16, 16)).save(small, PIL.Image.open(io.BytesIO(data)).format)
decode_image(open_image(small.getvalue(), limits))
image = open_image(data, limits)
expected = decode_peak_bytes(image, data)
def peak():  # ru_maxrss would be that of the tests' process, from which this one was started
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

base = peak()
decode_image(image)
print(expected, peak() - base)
"""
SIDE = 3000  # pixels


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"format": "JPEG", "progressive": True, "subsampling": 2}),
        ("RGBA", {"format": "PNG"}),
        ("RGB", {"format": "AVIF", "speed": 10, "subsampling": "4:4:4"}),
        *(
            pytest.param(mode, options, marks=pytest.mark.slow)
            for mode, options in (
                ("RGB", {"format": "JPEG"}),
                ("RGB", {"format": "JPEG", "progressive": True, "subsampling": 0}),
                ("L", {"format": "JPEG", "progressive": True}),
                ("CMYK", {"format": "JPEG", "progressive": True}),
                ("RGB", {"format": "PNG"}),
                ("I;16", {"format": "PNG"}),
                ("RGBA", {"format": "WEBP", "lossless": True}),
                ("P", {"format": "GIF"}),
                ("CMYK", {"format": "TIFF", "compression": "tiff_lzw"}),
                ("RGBA", {"format": "TIFF"}),
            )
        ),
    ],
    ids=lambda value: str(value),
)
def test_memory_of_decoding_is_at_most_the_estimate(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "picture"
    PIL.Image.linear_gradient("L").resize((SIDE, SIDE)).convert("L" if mode == "I;16" else mode).save(path, **options)
    if mode == "I;16":
        PIL.Image.fromarray(np.full((SIDE, SIDE), 4000, np.uint16)).save(path, **options)
    run = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True, cwd=ROOT)
    expected, actual = map(int, run.stdout.split())
    assert actual <= 1.05 * expected + 2**20
    assert expected <= 4 * actual


SECOND_OPENS_AS_FIRST_ENDS = """
import sys, threading
import PIL.Image
from embedder.inputs.limits import FixedLimits
from embedder.inputs.picture import open_image

first_is_in, second_is_in, first_is_done = (threading.Event() for _ in range(3))
open_file = PIL.Image.open

def open_in_turn(*arguments, **options):
    if threading.current_thread().name == "first":
        first_is_in.set()
        assert second_is_in.wait(30)
    else:
        second_is_in.set()
        assert first_is_done.wait(30)
    return open_file(*arguments, **options)

PIL.Image.open = open_in_turn
data, limits = bytes.fromhex(sys.argv[1]), FixedLimits(2**20, 2**20, 2**20, 60.0, False)
first, second = (threading.Thread(target=open_image, args=(data, limits), name=name) for name in ("first", "second"))
first.start()
assert first_is_in.wait(30)
second.start()
first.join()
first_is_done.set()
second.join()
"""


def test_warnings_of_pillow_are_not_shown_while_several_threads_decode() -> None:
    """Filters of warnings belong to the whole process, so a thread must not change them for one call."""
    data = png(64, 64, more=chunk(b"acTL", bytes(8)))  # an animation of no frames
    command = [sys.executable, "-c", SECOND_OPENS_AS_FIRST_ENDS, data.hex()]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stderr == ""
