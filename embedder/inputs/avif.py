"""Whether an AVIF file holds one still frame of the size that it declares, so that decoding takes a bounded time.

The file lists items: the picture, its alpha, EXIF and XMP. AV1 lets a picture have any number of frames that are never
shown, each of any size. But a sequence header with `reduced_still_picture_header` gives the size of the frames after it
(AV1 specification, 5.5.1), so a file passes if each picture has one such header and one frame. Grids, sequences, layers
and gain maps do not pass. Boxes: ISO/IEC 14496-12 and 23008-12.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator

MAX_META_BYTES = 2**16  # up to the end of the list of items and their properties, such as a color profile
MAX_TEXT_BYTES = 2**17  # of EXIF and XMP, which Pillow parses in Python
MAX_PARTS = 32  # boxes in a box, items of a file and units of a picture; libavif writes fewer than 10

_BRANDS = (b"avif", b"mif1")
_OUTERMOST = {b"ftyp", b"meta", b"mdat", b"free"}
_IN_META = {b"hdlr", b"pitm", b"iloc", b"iinf", b"iprp", b"iref"}
_PROPERTIES = {b"ispe", b"pixi", b"av1C", b"colr", b"auxC", b"irot", b"imir", b"pasp"}
_PICTURE, _TEXTS = b"av01", {b"Exif", b"mime"}
_SEQUENCE_HEADER, _FRAME = 1, 6
_UNITS = {_SEQUENCE_HEADER, 2, 5, _FRAME, 15}  # and: temporal delimiter, metadata, padding

_PLACE = struct.Struct(">H2xHII")  # of an item: number, pieces, offset and length
_Span = tuple[int, int]  # where bytes are in the file: start and end


class _NotPlain(Exception):
    """The file is damaged, or has a part that may hold more than one still frame."""


def is_still_frame(data: bytes) -> bool:
    """Whether every picture in the file is one frame of the size that the file declares."""
    try:
        _check(data)
    except (_NotPlain, struct.error, LookupError):
        return False
    return True


def _check(data: bytes) -> None:
    outermost = _different_boxes(data, (0, len(data)), _OUTERMOST)
    start, end = outermost[b"meta"]
    _require(data[4:8] == b"ftyp" and data[8:12] in _BRANDS and end <= MAX_META_BYTES)
    meta = _different_boxes(data, (start + 4, end), _IN_META)
    kinds, places = _kinds(data, meta[b"iinf"]), _places(data, meta[b"iloc"])
    _require(kinds.keys() == places.keys())
    sizes = _declared_sizes(data, meta[b"iprp"])
    num_text_bytes = 0
    for item, kind in kinds.items():
        start, end = places[item]
        if kind == _PICTURE:
            sizes.add(_frame_size(data, start, end))
        else:
            num_text_bytes += end - start
    _require(len(sizes) == 1 and num_text_bytes <= MAX_TEXT_BYTES)


def _require(is_plain: bool) -> None:
    if not is_plain:
        raise _NotPlain


def _boxes(data: bytes, span: _Span, kinds: Collection[bytes]) -> Iterator[tuple[bytes, _Span]]:
    """The boxes that fill a span: kind, and where the content is. Only these kinds are allowed."""
    position, end = span
    for _ in range(MAX_PARTS):
        if position == end:
            return
        size, kind = struct.unpack_from(">I4s", data, position)
        _require(kind in kinds and 8 <= size <= end - position)
        yield kind, (position + 8, position + size)
        position += size
    raise _NotPlain


def _different_boxes(data: bytes, span: _Span, kinds: Collection[bytes]) -> dict[bytes, _Span]:
    """The boxes that fill a span, at most one of each kind."""
    boxes: dict[bytes, _Span] = {}
    for kind, content in _boxes(data, span, kinds):
        _require(kind not in boxes)
        boxes[kind] = content
    return boxes


def _kinds(data: bytes, span: _Span) -> dict[int, bytes]:
    """The kind of each item, by its number."""
    start, end = span
    version, num_items = struct.unpack_from(">B3xH", data, start)
    kinds = {}
    for _, (entry, _) in _boxes(data, (start + 6, end), {b"infe"}):
        entry_version, item, kind = struct.unpack_from(">B3xH2x4s", data, entry)
        _require(entry_version == 2 and (kind == _PICTURE or kind in _TEXTS))
        kinds[item] = kind
    _require(version == 0 and len(kinds) == num_items)
    return kinds


def _places(data: bytes, span: _Span) -> dict[int, _Span]:
    """Where each item's bytes are, by its number."""
    start, end = span
    version, widths, num_items = struct.unpack_from(">B3xHH", data, start)
    _require(version == 0 and widths == 0x4400 and num_items <= MAX_PARTS)  # offsets and lengths of 4 bytes, no base
    _require(end - start == 8 + _PLACE.size * num_items)
    places = {}
    for item, num_pieces, place, length in _PLACE.iter_unpack(data[start + 8 : end]):
        _require(num_pieces == 1 and 0 < length <= len(data) - place)
        places[item] = (place, place + length)
    _require(len(places) == num_items)
    return places


def _declared_sizes(data: bytes, span: _Span) -> set[tuple[int, int]]:
    """Every width and height, in pixels, that the items' properties declare."""
    properties = list(_boxes(data, _different_boxes(data, span, {b"ipco", b"ipma"})[b"ipco"], _PROPERTIES))
    _require(b"av1C" in dict(properties))  # without it, the file could be taken for HEIC
    return {struct.unpack_from(">4xII", data, start) for kind, (start, _) in properties if kind == b"ispe"}


def _frame_size(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Width and height, in pixels, of a picture's only frame."""
    units = list(_units(data, start, end))
    kinds = [kind for kind, _ in units if kind in (_SEQUENCE_HEADER, _FRAME)]
    _require(kinds == [_SEQUENCE_HEADER, _FRAME])
    header = data[slice(*dict(units)[_SEQUENCE_HEADER])]
    bits = f"{int.from_bytes(header[:8].ljust(8, bytes(1))):064b}"
    _require(bits[3:5] == "11")  # still_picture, reduced_still_picture_header
    width_bits, height_bits = int(bits[10:14], 2) + 1, int(bits[14:18], 2) + 1
    height_from = 18 + width_bits
    return int(bits[18:height_from], 2) + 1, int(bits[height_from : height_from + height_bits], 2) + 1


def _units(data: bytes, position: int, end: int) -> Iterator[tuple[int, _Span]]:
    """The units (OBUs; AV1 specification, 5.3) that fill a span: kind, and where the content is."""
    for _ in range(MAX_PARTS):
        if position == end:
            return
        head = data[position]
        kind = head >> 3
        _require(head & 7 == 2 and kind in _UNITS)  # its size follows; it has no extension, which names a layer
        size, position = _size(data, position + 1)
        _require(size <= end - position)
        yield kind, (position, position + size)
        position += size
    raise _NotPlain


def _size(data: bytes, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte (leb128), the lowest first, and the position after it."""
    size = 0
    for shift in range(0, 56, 7):
        byte = data[position]
        position += 1
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            return size, position
    raise _NotPlain
