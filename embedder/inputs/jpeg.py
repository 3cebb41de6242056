"""The structure of a JPEG file: its segments and the scans of its first picture."""

from __future__ import annotations

import re
from collections.abc import Iterator

import PIL.Image
from PIL.JpegImagePlugin import JpegImageFile

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # without stuffed bytes, fill bytes and restart markers
_SEARCHED_BYTES = 2**18  # at once: the search holds the GIL, 0.2 s for 20 MB of stuffed bytes (one core of an AMD EPYC)
_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"


def count_scans(data: bytes, max_scans: int) -> int:
    """Scans of the first picture of a JPEG file, counted up to `max_scans`; 0 for other files.

    Bytes that look like markers do not count inside a segment (a thumbnail) or after the picture (a motion photo's
    video). As in libjpeg, bytes between segments are skipped, and the picture ends at its end marker.
    """
    num_scans = 0
    for marker, _ in segments(data):
        num_scans += is_scan(marker)
        if num_scans >= max_scans:
            break
    return num_scans


def segments(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The segments of the first picture of a JPEG file: marker, and position after it. None in other files."""
    if not data.startswith(_START):
        return
    position = len(_START)
    while (match := _next_marker(data, position)) and match[0] != _END:
        yield match[0], match.end()
        position = match.end()
        if match[0] != _START:
            position += max(2, int.from_bytes(data[position : position + 2]))


def _next_marker(data: bytes, position: int) -> re.Match[bytes] | None:
    for start in range(position, len(data), _SEARCHED_BYTES):
        if match := _MARKER.search(data, start, start + _SEARCHED_BYTES + 1):  # a marker has two bytes
            return match
    return None


def is_scan(marker: bytes) -> bool:
    """Whether a segment begins a scan."""
    return marker == _SCAN


def coefficient_bytes_per_pixel(image: PIL.Image.Image, data: bytes) -> float:
    """Memory of the coefficients, which libjpeg keeps if a JPEG has several scans: 2 bytes for each value.

    A JPEG has several scans if it is progressive, or if its first scan lacks a component.
    """
    if not isinstance(image, JpegImageFile):
        return 0.0
    start = next((position for marker, position in segments(data) if is_scan(marker)), len(data))
    num_in_first_scan = int.from_bytes(data[start + 2 : start + 3])
    samples = [(horizontal, vertical) for _, horizontal, vertical, _ in image.layer]
    if not samples or not (image.info.get("progressive") or num_in_first_scan < len(samples)):
        return 0.0
    largest = max(horizontal for horizontal, _ in samples) * max(vertical for _, vertical in samples)
    return 2 * sum(horizontal * vertical for horizontal, vertical in samples) / max(1, largest)
