"""An encoded image -> RGB values, by Pillow. Limits are checked on the header before any pixel is decoded.

No string is ever opened as a path. Only images that `structure` accepts are sure to be decoded in a limited time; the
others are decoded in a process that can be killed, see `decoder_process`.
"""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pi_heif
import PIL.AvifImagePlugin
import PIL.Image

from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.data_uri import MAX_HEADER_CHARS, decode_base64, is_base64, split_data_uri
from embedder.inputs.formats import IMAGE_FORMATS, MediaKind, unsupported_format
from embedder.inputs.heic import decode_heic
from embedder.inputs.items import Media
from embedder.inputs.jpeg import coefficient_bytes_per_pixel, count_scans
from embedder.inputs.limits import MediaLimits, check_deadline, check_num_pixels, decode_deadline
from embedder.inputs.orientation import exif_orientation, turn_upright
from embedder.inputs.structure import is_cut_off

MAX_JPEG_SCANS = 100  # a camera's progressive JPEG has 10; each takes 60 bytes and can cost a pass over all pixels
MAX_BOXES_BYTES = 2**16  # of an AVIF or HEIC file, searched for its codec
MIN_SIDE_PIXELS = 2  # a 1-pixel side would reach the model as one color, enlarged 64 times

# Pillow warns of damaged metadata, which is the caller's, and of many pixels, which `max_image_pixels` limits. The
# filter is set once, not around each call, because `catch_warnings` is not for several threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each item is decoded by one CPU
pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
_BYTES_PER_PIXEL = {"WEBP": 20.0, "AVIF": 24.0, "HEIF": 20.0}
_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
)
_PILLOW_FORMATS = tuple(one.pillow for one in IMAGE_FORMATS)
_HEIC = ("HEIF",)


def decode_peak_bytes(image: PIL.Image.Image, data: bytes) -> int:
    """Approximate peak memory of decoding the file `data`, in bytes.

    Bytes per pixel as measured with Pillow 13: RGB takes 4 and its upright copy 4, the decoders of WebP, AVIF and HEIC
    hold several copies, and so does converting any other mode to RGB. A JPEG of several scans also holds all its
    coefficients.
    """
    bytes_per_pixel = _BYTES_PER_PIXEL.get(image.format or "", 8.0 if image.mode == "RGB" else 13.0)
    return int((bytes_per_pixel + coefficient_bytes_per_pixel(image, data)) * image.width * image.height)


def open_image(source: Media, limits: MediaLimits, deadline: float | None = None) -> PIL.Image.Image:
    """Read an image's header and check its limits. The pixels are not decoded yet."""
    if not isinstance(source, PIL.Image.Image):
        data = encoded_bytes(source, "image", limits.max_image_bytes)
        source = _read_header(data, limits, decode_deadline(limits) if deadline is None else deadline)
    image = source
    if min(image.size) < MIN_SIDE_PIXELS:
        raise InvalidMedia(
            f"image of {image.width}x{image.height} pixels; allowed: at least {MIN_SIDE_PIXELS} on each side"
        )
    check_num_pixels("image", image.width, image.height, limits)
    return image


def encoded_bytes(source: bytes | str, kind: MediaKind, max_bytes: int) -> bytes:
    """The bytes of a file, given as bytes, base64 or data URI. Raises `InvalidMedia` and `MediaTooLarge`."""
    data = _decode_base64(source, kind, max_bytes) if isinstance(source, str) else source
    if not data:
        raise InvalidMedia(f"{kind} is empty (0 bytes)")
    if len(data) > max_bytes:
        raise MediaTooLarge(f"{kind} of {len(data)} bytes; allowed: up to {_named(max_bytes, kind)}")
    return data


def _named(max_bytes: int, kind: MediaKind) -> str:
    """The limit, and the setting that has it."""
    return f"{max_bytes} (EMBEDDER_MAX_{kind.upper()}_BYTES)"


def _decode_base64(text: str, kind: MediaKind, max_bytes: int) -> bytes:
    """Decode base64, bare or as a data URI; whitespace and missing padding are no errors."""
    if len(text) // 4 * 3 > max_bytes + max_bytes // 16 + MAX_HEADER_CHARS:  # with its line breaks and header
        num_bytes = len(text) // 4 * 3
        raise MediaTooLarge(f"{kind} of about {num_bytes} bytes; allowed: up to {_named(max_bytes, kind)}")
    if (parts := split_data_uri(text)) is not None:
        header, comma, text = parts
        if not comma or not is_base64(header):
            raise InvalidMedia(f"{kind} is a data URI without base64: {header[:60]!r}; allowed: data:..;base64,")
    try:
        return decode_base64(text)
    except ValueError as error:
        raise InvalidMedia(f"{kind} is not valid base64 ({error}); starts with {text[:20]!r}") from error


class _DeadlineBytes(io.BytesIO):
    """A file whose reads fail after the deadline: 20 MB can hold millions of empty chunks, comments or segments."""

    def __init__(self, data: bytes, limits: MediaLimits, deadline: float) -> None:
        super().__init__(data)
        self._limits = limits
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        check_deadline(self._deadline, self._limits)
        return super().read(size)


def _read_header(data: bytes, limits: MediaLimits, deadline: float) -> PIL.Image.Image:
    num_scans = count_scans(data, MAX_JPEG_SCANS + 1)
    if num_scans > MAX_JPEG_SCANS:
        raise MediaTooLarge(f"JPEG image of more than {MAX_JPEG_SCANS} scans; allowed: up to {MAX_JPEG_SCANS}")
    formats = _formats_to_try(data)
    if formats == _HEIC and is_cut_off(data):  # its library would leave missing tiles black
        raise InvalidMedia("HEIC image that is cut off: its last part is longer than the file")
    try:
        image = PIL.Image.open(_DeadlineBytes(data, limits, deadline), formats=formats)
    except PIL.Image.DecompressionBombError as error:
        raise MediaTooLarge(
            f"{error}; allowed: up to {limits.max_image_pixels} pixels (EMBEDDER_MAX_IMAGE_PIXELS)"
        ) from error
    except PIL.UnidentifiedImageError as error:
        raise InvalidMedia(unsupported_format("image", data)) from error
    except _ERRORS as error:
        raise InvalidMedia(f"image header cannot be read: {error}") from error
    if image.format == "HEIF" and not image.info["primary"]:  # pi-heif takes another one, such as a tile
        raise InvalidMedia("HEIC image whose primary picture cannot be read: a part of it is missing or damaged")
    return image


def _formats_to_try(data: bytes) -> tuple[str, ...]:
    """Pillow's names. A file may claim to be both AVIF and HEIC; the boxes that configure its codec tell."""
    head = data[:MAX_BOXES_BYTES]
    is_heic = head[4:8] == b"ftyp" and b"hvcC" in head and b"av1C" not in head
    return _HEIC if is_heic else _PILLOW_FORMATS


def decode_image(image: PIL.Image.Image, *, is_raw: bool = False) -> PIL.Image.Image:
    """Decode the pixels to RGB, with every transparent mode composited on white. Upright, unless `is_raw`."""
    opaque = _decode_rgb(image)
    return opaque if is_raw else turn_upright(opaque, exif_orientation(image))


def _decode_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        if isinstance(image, pi_heif.HeifImageFile):
            image = decode_heic(image.fp.getvalue(), image.mode, image.info["bit_depth"])
        if image.mode.startswith(("I", "F")):
            image = _to_8_bit_gray(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            transparent = image if image.mode == "RGBA" else image.convert("RGBA")
            opaque = PIL.Image.new("RGB", image.size, (255, 255, 255))
            opaque.paste(transparent, mask=transparent.getchannel("A"))
            return opaque
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # `convert` copies: 200 MB for 50 million pixels
    except _ERRORS as error:
        raise InvalidMedia(f"image cannot be decoded: {error}") from error


def _to_8_bit_gray(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale 16-bit gray to 8 bits. PIL would clip values to 255, and the transparent value too."""
    if image.mode in ("I", "F"):
        raise InvalidMedia(f"image of mode {image.mode}, whose value range is unknown; allowed: 8 bits, or 16-bit gray")
    values = np.asarray(image)
    if (transparent := image.info.get("transparency")) is not None:
        values = np.where(values == transparent, np.uint16(65535), values)
    return PIL.Image.fromarray((values // 257).astype(np.uint8))
