"""Whether an encoded image is built so that decoding it in a thread takes a bounded time.

Pillow reads the structure of a file (chunks, segments and comments) in Python, while it holds the GIL, and decodes some
formats completely in Python. A thread cannot be stopped. So a file passes only if its pixels are decoded by a C library
that releases the GIL, and its structure is short. The checks here read a limited number of chunks.
"""

from __future__ import annotations

from itertools import islice

from embedder.inputs.avif import is_still_frame
from embedder.inputs.jpeg import is_scan, segments

MAX_SCANS = 16  # of a JPEG; a camera's progressive one has 10. Each can cost a pass over all pixels
MAX_SEGMENTS = 256  # of a JPEG; a camera writes about 10, a progressive one up to 4 for each scan
MAX_HEADER_BYTES = 2**19  # of a JPEG before its first scan
MAX_EXIF_BYTES = 2**17  # parsed in Python: 70 ms for as many entries as fit. Cameras write up to 2**16
MAX_BLOCKS = 256  # of a GIF before its first picture, where one is usual, and of a WebP
MAX_CHUNKS = 64  # of a PNG, plus one for each `PIXEL_CHUNK_BYTES` of the file
PIXEL_CHUNK_BYTES = 2**12  # libpng writes chunks of 8 KiB

_RAW_EXIF = b"Raw profile type"  # a text chunk of a PNG that holds EXIF as hexadecimal digits
_JPEG, _PNG, _WEBP, _GIF, _BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"WEBP", b"GIF8", b"BM"
_BOXES = b"ftyp"  # AVIF and HEIC


def is_bounded(data: bytes) -> bool:
    """Whether the file may be opened and decoded in a thread, as far as its structure is concerned."""
    if data.startswith(_JPEG):
        return _has_few_segments(data)
    if data.startswith(_PNG):
        return _has_few_chunks(data)
    if data.startswith(_GIF):
        return _has_few_blocks(data)
    if data.startswith(_BMP):
        return int.from_bytes(data[14:18], "little") >= 40 and not any(data[30:34])  # not run-length encoded
    if data[4:8] == _BOXES:
        return is_still_frame(data)  # not HEIC
    return data[8:12] == _WEBP and _has_few_webp_chunks(data)  # not TIFF and ICO


def is_cut_off(data: bytes) -> bool:
    """Whether the last box of an AVIF or HEIC file is longer than the file."""
    position = 0
    for _ in range(MAX_BLOCKS):
        size = int.from_bytes(data[position : position + 4])
        if size == 1:  # the size follows, in eight bytes
            size = int.from_bytes(data[position + 8 : position + 16])
        position += size
        if size < 8 or position >= len(data):  # of no size: up to the end
            break
    return position > len(data)


def _has_few_segments(data: bytes) -> bool:
    found = list(islice(segments(data), MAX_SEGMENTS + 1))
    scans = [position for marker, position in found if is_scan(marker)]
    parsed = [
        int.from_bytes(data[position : position + 2])
        for _, position in found
        if data.startswith((b"Exif", b"Photoshop"), position + 2)
    ]
    return (
        sum(parsed) <= MAX_EXIF_BYTES
        and len(found) <= MAX_SEGMENTS
        and 0 < len(scans) <= MAX_SCANS
        and scans[0] <= MAX_HEADER_BYTES
    )


def _has_few_chunks(data: bytes) -> bool:
    position = len(_PNG)
    for _ in range(MAX_CHUNKS + len(data) // PIXEL_CHUNK_BYTES):
        size, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        if (kind == b"eXIf" and size > MAX_EXIF_BYTES) or data.startswith(_RAW_EXIF, position + 8):
            return False
        position += 12 + size
        if position >= len(data):
            return True
    return False


def _has_few_webp_chunks(data: bytes) -> bool:
    """The pixels are decoded in C. Of the rest, Pillow reads EXIF."""
    position = 12
    for _ in range(MAX_BLOCKS):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data.startswith(b"EXIF", position) and size > MAX_EXIF_BYTES:
            return False
        position += 8 + size + size % 2
        if position >= len(data):
            return True
    return False


def _has_few_blocks(data: bytes) -> bool:
    """Whether the first picture of a GIF, the only one that is decoded, comes soon. Its own blocks are read in C."""
    has_colors = data[10:11] >= b"\x80"
    position = 13 + (3 * 2 ** ((data[10] & 7) + 1) if has_colors else 0)
    for _ in range(MAX_BLOCKS):
        if data[position : position + 1] == b",":
            return True
        if data[position : position + 1] == b"!":  # an extension: its kind, then blocks
            position += 2
        size = data[position : position + 1]
        if not size:
            return False
        position += 1 + size[0]
    return False
