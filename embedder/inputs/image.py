"""An item's pictures -> decoded RGB values, resized, within limits.

Untrusted bytes are read here and in `video`, nowhere else. Everything that the header tells is checked before
pixels are decoded. No string is opened as a path.
"""

from __future__ import annotations

import binascii
import ctypes
import io
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL.Image
import pybase64
from numpy.typing import NDArray

from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.settings import Settings
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from qwen_vl_utils.vision_process import MAX_RATIO, smart_resize  # noqa: E402 - after the declaration

if TYPE_CHECKING:
    from embedder.inputs.items import Media

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_JPEG_SCANS = 100  # a camera's progressive picture has 10; each may cost a pass over all pixels, for 60 bytes
TRIMMED_BYTES = 2**27
MIN_SIDE_PIXELS = 2  # a 1-pixel side holds no picture; the model would see one color enlarged 64 times

_SIGNATURES = {
    b"%PDF": "a PDF document",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML or SVG document",
    b"<!DO": "an HTML page",
    b"<htm": "an HTML page",
    b"PK\x03\x04": "a ZIP archive or office document",
    b"II*\x00": "a TIFF image",
    b"MM\x00*": "a TIFF image",
    b"\x1aE\xdf\xa3": "a Matroska or WebM video",
}


@dataclass(frozen=True)
class ImageGeometry:
    """How large pictures become: sides are multiples of `factor`, area between `min_pixels` and `max_pixels`."""

    factor: int
    min_pixels: int
    max_pixels: int


def resized_size(height: int, width: int, geometry: ImageGeometry) -> tuple[int, int]:
    """Height and width in pixels that the model sees, keeping the aspect ratio as nearly as the grid allows.

    The reference's `smart_resize`, except that no side falls to zero where `max_pixels` is small and the picture long.
    Raises `InvalidMedia` for an aspect ratio above 200.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_RATIO:
        raise InvalidMedia(
            f"image of {width}x{height} pixels has an aspect ratio of {ratio:.0f}:1; allowed: up to {MAX_RATIO}:1"
        )
    sides = smart_resize(height, width, geometry.factor, geometry.min_pixels, geometry.max_pixels)
    return max(sides[0], geometry.factor), max(sides[1], geometry.factor)


class _Room:
    """Bytes that threads take in the order they come, each waiting until there are so many, or nobody has any."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._num_taken = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def __call__(self, num_bytes: int) -> Iterator[None]:
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            self._changed.wait_for(lambda: self._waiting[0] is turn and self._has(num_bytes))
            self._waiting.popleft()
            self._num_taken += num_bytes
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_taken -= num_bytes
                self._changed.notify_all()
            if num_bytes >= TRIMMED_BYTES:
                _trim()

    def _has(self, num_bytes: int) -> bool:
        return not self._num_taken or self._num_taken + num_bytes <= self.num_bytes


def _trim() -> None:
    """Give free memory back to the system, in 20 ms: glibc keeps of each thread's for ever what lies between."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other systems' allocators do without
        trim(0)


# Around what decodes, with the memory it takes: a WebP of 40 bytes takes a gigabyte, and there are many threads.
decoding = _Room(2**31)


def decoded_bytes(image: PIL.Image.Image) -> int:
    """About what decoding takes at its peak, in bytes (measured with Pillow 12): RGB is kept in 4, WebP thrice over."""
    each = 20 if image.format == "WEBP" else 4 if image.mode == "RGB" else 13
    return each * image.width * image.height


def decode_deadline(settings: Settings) -> float:
    """When decoding that begins now must be done, on the clock of `time.monotonic`."""
    return time.monotonic() + settings.decode_timeout_s


def check_time(deadline: float, settings: Settings) -> None:
    """Raises `MediaTooLarge` after the deadline."""
    if time.monotonic() > deadline:
        raise MediaTooLarge(f"decoding took over {settings.decode_timeout_s:g} s; send smaller or fewer pictures")


def load_image(
    source: Media, geometry: ImageGeometry, settings: Settings, deadline: float | None = None
) -> NDArray[np.uint8]:
    """One picture -> RGB values, (height, width, 3) uint8, resized for the model.

    EXIF orientation is not applied and of an animation the first frame is taken, both as in the reference.
    Transparency is laid on white. Without a deadline the time counts from here. Raises `InvalidMedia` and
    `MediaTooLarge`.
    """
    image = open_image(source, settings, deadline)
    height, width = resized_size(image.height, image.width, geometry)
    with decoding(decoded_bytes(image)):
        return resize(decode_image(image), height, width)


def resize(image: PIL.Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8, as the reference resizes: PIL's bicubic."""
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))


def open_image(source: object, settings: Settings, deadline: float | None = None) -> PIL.Image.Image:
    """A picture whose header was read and found within limits; its pixels are not decoded yet."""
    if not isinstance(source, PIL.Image.Image):
        data = encoded_bytes(source, "image", settings.max_image_bytes)
        source = _read_header(data, settings, decode_deadline(settings) if deadline is None else deadline)
    image = source
    if min(image.size) < MIN_SIDE_PIXELS:
        raise InvalidMedia(
            f"image of {image.width}x{image.height} pixels; allowed: at least {MIN_SIDE_PIXELS} on each side"
        )
    if image.width * image.height > settings.max_image_pixels:
        raise MediaTooLarge(
            f"image of {image.width}x{image.height} = {image.width * image.height} pixels; "
            f"allowed: up to {settings.max_image_pixels}"
        )
    return image


def encoded_bytes(source: object, what: Literal["image", "video"], max_bytes: int) -> bytes:
    """Bytes, or their base64, bare or as a data URI -> bytes, not decoded. Raises `InvalidMedia`, `MediaTooLarge`."""
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str):
        data = _from_base64(source, what, max_bytes)
    else:
        other = "a PIL image" if what == "image" else "a list of frames"
        raise InvalidMedia(f"{what} is given as {type(source).__name__}; allowed: base64, bytes or {other}")
    if not data:
        raise InvalidMedia(f"{what} is empty (0 bytes)")
    if len(data) > max_bytes:
        raise MediaTooLarge(f"{what} of {len(data)} bytes; allowed: up to {max_bytes}")
    return data


def _from_base64(text: str, what: str, max_bytes: int) -> bytes:
    """Line breaks are allowed, anything else outside the alphabet is not."""
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise InvalidMedia(f"{what} is a data URI that is not base64: {header[:60]!r}")
    if len(text) // 4 * 3 > max_bytes + 2:
        raise MediaTooLarge(f"{what} of about {len(text) // 4 * 3} bytes; allowed: up to {max_bytes}")
    try:
        data = text.encode("ascii").translate(None, b" \t\r\n\v\f") if "\n" in text else text
        return pybase64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidMedia(f"{what} is not valid base64 ({error}); starts with {text[:20]!r}") from error


class _TimedBytes(io.BytesIO):
    """Ends what reads for too long: 20 MB hold millions of empty chunks, comments or segments."""

    def __init__(self, data: bytes, settings: Settings, deadline: float) -> None:
        super().__init__(data)
        self._settings = settings
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        check_time(self._deadline, self._settings)
        return super().read(size)


def _read_header(data: bytes, settings: Settings, deadline: float) -> PIL.Image.Image:
    num_scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if num_scans > MAX_JPEG_SCANS:
        raise MediaTooLarge(f"JPEG image of {num_scans} scans; allowed: up to {MAX_JPEG_SCANS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # max_image_pixels rules instead
            return PIL.Image.open(_TimedBytes(data, settings, deadline), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise MediaTooLarge(f"{error}; allowed: up to {settings.max_image_pixels} pixels") from error
    except PIL.UnidentifiedImageError as error:
        raise InvalidMedia(f"{describe(data)}; allowed: {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InvalidMedia(f"image header cannot be read: {error}") from error


def describe(data: bytes) -> str:
    """What bytes are that are not what was asked for."""
    if data[4:8] == b"ftyp":
        return "the bytes are an MP4 video or HEIF/AVIF image"
    start = data.lstrip()
    kind = next((kind for signature, kind in _SIGNATURES.items() if start.startswith(signature)), "not a known image")
    return f"the bytes are {kind} (they start with {data[:8].hex(' ')})"


def decode_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decoded RGB. The reference lays RGBA on white; other ways to be transparent get the same here."""
    try:
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            transparent = image if image.mode == "RGBA" else image.convert("RGBA")
            opaque = PIL.Image.new("RGB", image.size, (255, 255, 255))
            opaque.paste(transparent, mask=transparent.getchannel("A"))
            return opaque
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy of 50 million pixels is 200 MB
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise InvalidMedia(f"image cannot be decoded: {error}") from error


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """16 bit gray -> 8 bit. PIL would clip to 255 instead of scaling, and so would its transparency."""
    if image.mode in ("I", "F"):  # no file has them, a program may
        raise InvalidMedia(f"image of mode {image.mode}, whose range nothing tells; allowed: 8 bits, or 16 bit gray")
    values = np.asarray(image)
    if (transparent := image.info.get("transparency")) is not None:
        values = np.where(values == transparent, np.uint16(65535), values)
    return PIL.Image.fromarray((values // 257).astype(np.uint8))
