"""An encoded image -> RGB values, resized for the model.

Untrusted bytes are decoded here and in `video`, nowhere else. Limits are checked on the header before any pixel is
decoded. No string is ever opened as a path.
"""

from __future__ import annotations

import ctypes
import io
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.data_uri import MAX_HEADER_CHARS, decode_base64, is_base64, split_data_uri
from embedder.inputs.formats import IMAGE_FORMATS, MediaKind, unsupported_format
from embedder.inputs.items import Media
from embedder.inputs.jpeg import count_scans
from embedder.inputs.limits import MediaLimits
from embedder.inputs.orientation import exif_orientation, turn_upright
from embedder.inputs.regimes import Regime
from embedder.inputs.resample import resize

MAX_DECODE_MEMORY = 2**31  # bytes, for all threads
TRIM_MIN_BYTES = 2**27
MIN_SIDE_PIXELS = 2  # a 1-pixel side would reach the model as one color, enlarged 64 times
# A camera's progressive JPEG has 10. Each scan takes 60 bytes in the file and can cost a pass over all pixels.
MAX_JPEG_SCANS = 100

_PILLOW_FORMATS = tuple(one.pillow for one in IMAGE_FORMATS)


class MemoryBudget:
    """Bytes of memory that threads reserve, first come, first served.

    A reservation larger than the whole budget is granted when no other is held.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._num_reserved = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Wait for the bytes, and hold them inside the `with` block."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._fits(num_bytes))
            self._waiting.popleft()
            self._num_reserved += num_bytes
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_reserved -= num_bytes
                self._changed.notify_all()
            if num_bytes >= TRIM_MIN_BYTES:
                _return_free_memory()

    def _fits(self, num_bytes: int) -> bool:
        return not self._num_reserved or self._num_reserved + num_bytes <= self.max_bytes


def _return_free_memory() -> None:
    """Return freed memory to the system (20 ms). glibc would keep a thread's freed memory for that thread."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
        trim(0)


# A WebP of 40 bytes can take a gigabyte to decode, and many threads decode: each reserves its peak first.
decode_memory = MemoryBudget(MAX_DECODE_MEMORY)


def decode_peak_bytes(image: PIL.Image.Image) -> int:
    """Approximate peak memory of decoding, in bytes.

    Bytes per pixel as measured with Pillow 12: RGB takes 4, WebP's decoder holds three copies, and converting any
    other mode to RGB holds several.
    """
    bytes_per_pixel = 20 if image.format == "WEBP" else 8 if image.mode == "RGB" else 13
    return bytes_per_pixel * image.width * image.height


def decode_deadline(settings: MediaLimits) -> float:
    """The time at which decoding that starts now must be finished, on the clock of `time.monotonic`."""
    return time.monotonic() + settings.decode_timeout_s


def check_deadline(deadline: float, limits: MediaLimits) -> None:
    """Raises `MediaTooLarge` after the deadline."""
    if time.monotonic() > deadline:
        raise MediaTooLarge(
            f"decoding took more than {limits.decode_timeout_s:g} s (decode_timeout_s); send smaller or fewer images"
        )


def load_image(source: Media, regime: Regime, limits: MediaLimits, deadline: float | None = None) -> NDArray[np.uint8]:
    """Decode an image to RGB values, (height, width, 3) uint8, upright and resized for the model.

    Of an animation, the first frame is used. Transparent pixels are composited on white. `deadline` defaults to
    `decode_timeout_s` from now. Raises `InvalidMedia` and `MediaTooLarge`.
    """
    image = open_image(source, limits, deadline)
    regime.resize_image(image.height, image.width)  # refuses extreme aspect ratios before decoding
    with decode_memory.reserve(decode_peak_bytes(image)):
        upright = decode_image(image, is_raw=limits.raw_orientation)
        return resize(upright, [regime.resize_image(upright.height, upright.width)])


def open_image(source: Media, settings: MediaLimits, deadline: float | None = None) -> PIL.Image.Image:
    """Read an image's header and check its limits. The pixels are not decoded yet."""
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


def encoded_bytes(source: bytes | str, kind: MediaKind, max_bytes: int) -> bytes:
    """The bytes of a file, given as bytes, base64 or data URI. Raises `InvalidMedia` and `MediaTooLarge`."""
    data = _decode_base64(source, kind, max_bytes) if isinstance(source, str) else source
    if not data:
        raise InvalidMedia(f"{kind} is empty (0 bytes)")
    if len(data) > max_bytes:
        raise MediaTooLarge(f"{kind} of {len(data)} bytes; allowed: up to {max_bytes}")
    return data


def _decode_base64(text: str, kind: MediaKind, max_bytes: int) -> bytes:
    """Decode base64, bare or as a data URI; whitespace and missing padding are no errors."""
    if len(text) // 4 * 3 > max_bytes + max_bytes // 16 + MAX_HEADER_CHARS:  # with its line breaks and header
        raise MediaTooLarge(f"{kind} of about {len(text) // 4 * 3} bytes; allowed: up to {max_bytes}")
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

    def __init__(self, data: bytes, settings: MediaLimits, deadline: float) -> None:
        super().__init__(data)
        self._settings = settings
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        check_deadline(self._deadline, self._settings)
        return super().read(size)


def _read_header(data: bytes, settings: MediaLimits, deadline: float) -> PIL.Image.Image:
    num_scans = count_scans(data, MAX_JPEG_SCANS + 1)
    if num_scans > MAX_JPEG_SCANS:
        raise MediaTooLarge(f"JPEG image of more than {MAX_JPEG_SCANS} scans; allowed: up to {MAX_JPEG_SCANS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # max_image_pixels limits
            return PIL.Image.open(_DeadlineBytes(data, settings, deadline), formats=_PILLOW_FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise MediaTooLarge(f"{error}; allowed: up to {settings.max_image_pixels} pixels") from error
    except PIL.UnidentifiedImageError as error:
        raise InvalidMedia(unsupported_format("image", data)) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InvalidMedia(f"image header cannot be read: {error}") from error


def decode_image(image: PIL.Image.Image, *, is_raw: bool = False) -> PIL.Image.Image:
    """Decode the pixels to RGB, with every transparent mode composited on white. Upright, unless `is_raw`."""
    opaque = _decode_rgb(image)
    return opaque if is_raw else turn_upright(opaque, exif_orientation(image))


def _decode_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        if image.mode.startswith(("I", "F")):
            image = _to_8_bit_gray(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            transparent = image if image.mode == "RGBA" else image.convert("RGBA")
            opaque = PIL.Image.new("RGB", image.size, (255, 255, 255))
            opaque.paste(transparent, mask=transparent.getchannel("A"))
            return opaque
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # `convert` copies: 200 MB for 50 million pixels
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise InvalidMedia(f"image cannot be decoded: {error}") from error


def _to_8_bit_gray(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale 16-bit gray to 8 bits. PIL would clip values to 255, and the transparent value too."""
    if image.mode in ("I", "F"):  # only from PIL, not from a file
        raise InvalidMedia(f"image of mode {image.mode}, whose value range is unknown; allowed: 8 bits, or 16-bit gray")
    values = np.asarray(image)
    if (transparent := image.info.get("transparency")) is not None:
        values = np.where(values == transparent, np.uint16(65535), values)
    return PIL.Image.fromarray((values // 257).astype(np.uint8))
