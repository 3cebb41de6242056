"""The structure of a JPEG file: how many scans its first picture has."""

from __future__ import annotations

import re

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # without stuffed bytes, fill bytes and restart markers
_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"


def count_scans(data: bytes, max_scans: int) -> int:
    """Scans of the first picture of a JPEG file, counted up to `max_scans`; 0 for other files.

    Bytes that look like markers do not count inside a segment (a thumbnail) or after the picture (a motion photo's
    video). As in libjpeg, bytes between segments are skipped, and the picture ends at its end marker.
    """
    if not data.startswith(_START):
        return 0
    num_scans, position = 0, len(_START)
    while num_scans < max_scans and (match := _MARKER.search(data, position)):
        if match[0] == _END:
            break
        num_scans += match[0] == _SCAN
        position = match.end()
        if match[0] != _START:
            position += max(2, int.from_bytes(data[position : position + 2]))
    return num_scans
