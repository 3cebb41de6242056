"""HEIC files, box by box: what no encoder writes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from tests.conftest import encoded, picture

TILE_SIDE = 64


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def full_box(kind: bytes, *parts: bytes, version: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24), *parts)


def size_box(width: int, height: int) -> bytes:
    return full_box(b"ispe", struct.pack(">II", width, height))


@dataclass
class Item:
    """An item, its properties, and the items that it is made of."""

    kind: bytes
    data: bytes = b""
    properties: list[bytes] = field(default_factory=list)
    made_of: Sequence[int] = ()


def tile() -> Item:
    """A picture of 64x64 pixels."""
    file = encoded(picture(TILE_SIDE, TILE_SIDE), "HEIF")
    start = file.index(b"hvcC") - 4
    config = file[start : start + int.from_bytes(file[start : start + 4])]
    return Item(b"hvc1", file[file.index(b"mdat") + 4 :], [config, size_box(TILE_SIDE, TILE_SIDE)])


def grid(columns: int, rows: int, made_of: Sequence[int], width: int = 0, height: int = 0) -> Item:
    """A picture of tiles, as cameras write it."""
    width, height = width or columns * TILE_SIDE, height or rows * TILE_SIDE
    data = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, width, height)
    return Item(b"grid", data, [size_box(width, height)], made_of)


def heic(*items: Item, primary: int = 1) -> bytes:
    """A file of these items, numbered from 1. Those with the same data or property share it."""
    properties = list(dict.fromkeys(one for item in items for one in item.properties))
    contents = list(dict.fromkeys(item.data for item in items))
    offsets = dict(zip(contents, accumulate(map(len, contents), initial=0), strict=False))
    locations, associations, entries, references = [], [], [], []
    for number, item in enumerate(items, 1):
        locations.append(struct.pack(">HHHHII", number, 1, 0, 1, offsets[item.data], len(item.data)))
        indices = [properties.index(one) + 1 for one in item.properties]
        associations.append(struct.pack(f">HB{len(indices)}B", number, len(indices), *indices))
        entries.append(full_box(b"infe", struct.pack(">HH", number, 0), item.kind, b"\0", version=2))
        if item.made_of:
            count = len(item.made_of)
            references.append(box(b"dimg", struct.pack(f">HH{count}H", number, count, *item.made_of)))
    return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + full_box(
        b"meta",
        full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
        full_box(b"pitm", struct.pack(">H", primary)),
        full_box(b"iloc", struct.pack(">HH", 0x4400, len(items)), *locations, version=1),
        full_box(b"iinf", struct.pack(">H", len(items)), *entries),
        full_box(b"iref", *references),
        box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", struct.pack(">I", len(items)), *associations)),
        box(b"idat", *contents),
    )


def hostile_files() -> dict[str, bytes]:
    """Files that declare or repeat too much."""
    one = tile()
    good = heic(one)
    size = good.index(b"ispe") + 8
    deep = [Item(b"iden", b"", [size_box(TILE_SIDE, TILE_SIDE)], [number]) for number in range(2, 200)]
    return {
        "HEIC of 2**62 pixels": good[:size] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + good[size + 8 :],
        "HEIC of no pixels": good[:size] + bytes(8) + good[size + 8 :],
        "HEIC of fewer pixels than it says": good[:size] + struct.pack(">II", 4000, 4000) + good[size + 8 :],
        "HEIC of more pixels than it says": good[:size] + struct.pack(">II", 16, 16) + good[size + 8 :],
        "HEIC grid of 961 tiles": heic(grid(31, 31, range(2, 963)), *[one] * 961),
        "HEIC grid of 9,801 tiles": heic(grid(99, 99, range(2, 9803)), *[one] * 9801),
        "HEIC grid of one tile 9,801 times": heic(grid(99, 99, [2] * 9801), one),
        "HEIC grid of tiles that are missing": heic(grid(99, 99, range(2, 9)), one),
        "HEIC grid of itself": heic(grid(2, 2, [1] * 4), one),
        "HEIC grids of each other": heic(grid(1, 1, [2]), grid(1, 1, [1])),
        "HEIC grid of 2**62 pixels": heic(grid(2, 2, range(2, 6), 2**31 - 1, 2**31 - 1), *[one] * 4),
        "HEIC grids of grids": heic(*_nested(one)),
        "HEIC of 198 derivations": heic(*deep, one),
        "HEIC of 60,000 items": heic(one, *[Item(b"mime")] * 60_000),
        "HEIC of 900 pictures": heic(*[one] * 900),
        "HEIC whose item is longer than the file": good.replace(
            struct.pack(">II", 0, len(one.data)), struct.pack(">II", 0, 2**31), 1
        ),
    }


def _nested(tile: Item) -> list[Item]:
    """Twenty levels of 36 grids, each of which has the 36 grids of the next level as its tiles: 36**20 tiles."""
    grids = [[grid(6, 6, range(2 + 36 * level, 38 + 36 * level), 6000, 6000)] for level in range(21)]
    return [*grids[0], *(one for level in grids[1:] for one in level * 36), *[tile] * 36]
