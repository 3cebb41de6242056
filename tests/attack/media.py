"""Attacks in pictures and clips: random damage, floods of chunks, and containers whose tables are random."""

from __future__ import annotations

import base64
import functools
import json
import random
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import PIL.Image

from tests.attack.bodies import post
from tests.conftest import encoded, picture
from tests.inputs import hostile, hostile_clips

_MASTER = ("1549A966", "1654AE6B", "1254C367", "1941A469", "1043A770", "1C53BB6B", "1F43B675", "AE", "45B9", "7373")
_PLAIN = ("D7", "83", "86", "B0", "BA", "61A7", "B6", "BB", "45A3", "4487", "67C8", "A3", "E7", "55B0", "63A2")
_BOXES = (b"stts", b"stsc", b"stsz", b"stco", b"ctts", b"senc", b"iinf", b"saiz", b"sbgp", b"trun", b"keys", b"elst")


def damaged(draw: random.Random) -> bytes:
    """A good file with some bytes changed, doubled or cut."""
    data = bytearray(draw.choice(_good_files()))
    for _ in range(draw.randrange(1, 20)):
        place = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[place] = draw.randrange(256)
            case 1:
                data[place : place + 4] = struct.pack(">I", draw.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1)))
            case 2:
                data[place:place] = data[place : place + draw.randrange(200)] * draw.randrange(1, 50)
            case 3 if len(data) > 100:
                del data[place : place + draw.randrange(50)]
    return bytes(data)


def flood(draw: random.Random) -> bytes:
    """A PNG, JPEG or AVIF with very many chunks, comments, scans or frames, or a BMP of run lengths."""
    count = draw.randrange(1, 30_000)
    match draw.randrange(5):
        case 0:
            kind = draw.choice((b"tEXt", b"zTXt", b"iTXt", b"sPLT", b"PLTE", b"IDAT", b"fdAT", b"gAMA"))
            return hostile.png(64, 64, more=hostile.chunk(kind, draw.randbytes(draw.randrange(12))) * count)
        case 1:
            jpeg = encoded(picture(64, 48), "JPEG")
            return jpeg[:2] + (b"\xff" + draw.choice((b"\xfe", b"\xe1", b"\xe2")) + b"\0\4ab") * count + jpeg[2:]
        case 2:
            return hostile.jpeg_of_scans(picture(64, 48), draw.randrange(2, 200))
        case 3:
            return hostile.avif_of_frames(picture(64, 48), count)
        case _:
            width, height = draw.randrange(1, 4000), draw.randrange(1, 4000)
            rows = draw.choice((b"\1\0", b"\xff\1", b"\0\0", b"\0\2\1\1")) * count + b"\0\1"
            head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
            offset = 14 + 40 + 1024
            return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + head + bytes(1024) + rows


def matroska(draw: random.Random) -> bytes:
    """Matroska's header, then elements of random kinds, some of them many times."""

    def element(depth: int) -> bytes:
        if depth and draw.random() < 0.6:
            name, data = draw.choice(_MASTER), b"".join(element(depth - 1) for _ in range(draw.randrange(6)))
        else:
            name, data = draw.choice(_PLAIN), draw.randbytes(draw.choice((0, 1, 4, 8, 40)))
        whole = bytes.fromhex(name) + (len(data) | 1 << 28).to_bytes(4, "big") + data
        return whole * (draw.randrange(1, 3000) if draw.random() < 0.1 and len(whole) < 100 else 1)

    kind = b"\x42\x82\x88matroska"
    header = bytes.fromhex("1A45DFA3") + bytes([0x80 | len(kind)]) + kind
    content = b"".join(element(3) for _ in range(draw.randrange(1, 9)))[: 2**20]
    return header + bytes.fromhex("18538067") + (len(content) | 1 << 56).to_bytes(8, "big") + content


def mp4(draw: random.Random) -> bytes:
    """An MP4 in which tables declare random numbers of entries, with or without the bytes."""
    data = bytearray(hostile.videos()["mp4"])
    for name in draw.sample(_BOXES, 6):
        at = data.find(name)
        if at > 0 and at + 16 < len(data):
            place = at + draw.choice((8, 12))
            data[place : place + 4] = struct.pack(">I", draw.choice((0, 1, 10_000, 2**24, 2**28, 2**31 - 1)))
    box = draw.choice(_BOXES)
    extra = struct.pack(">III", 0, draw.randrange(2**31), draw.randrange(2**16)) + draw.randbytes(draw.randrange(90))
    free = struct.pack(">I4s", 8 + len(extra), box) + extra
    return bytes(data) + struct.pack(">I4s", 8 + len(free), b"meta") + free


@functools.cache
def _good_files() -> list[bytes]:
    image = picture(64, 48)
    files = [encoded(image, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF")]
    return [*files, encoded(image, "JPEG", progressive=True), *hostile.videos().values(), zlib.compress(b"a")]


def clips(draw: random.Random, port: int) -> None:
    """A clip whose containers or packets hold FFmpeg for a long time or take much memory."""
    _, data = hostile_clips.random_clip(draw, 0.1)
    post(port, "/embed", json.dumps({"items": [{"video": base64.b64encode(data).decode()}]}).encode())


def large(draw: random.Random, port: int) -> None:
    """Pictures of a few kilobytes that take much memory, in several requests at once."""
    body = json.dumps(
        {"input": _large_picture(draw.choice(("WEBP", "PNG", "GIF", "AVIF")), draw.choice((2000, 4000, 7000)))}
    )
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: post(port, "/img/embed", body.encode()), range(draw.randrange(1, 7))))


@functools.cache
def _large_picture(kind: str, side: int) -> str:
    options = {"WEBP": {"lossless": True}, "AVIF": {"speed": 10}}.get(kind, {})
    return base64.b64encode(encoded(PIL.Image.new("RGB", (side, side), "red"), kind, **options)).decode()


def documents(draw: random.Random, port: int) -> None:
    """A damaged PDF or TIFF file, of which some pages are asked for."""
    data = bytearray(draw.choice(_good_documents()))
    for _ in range(draw.randrange(9)):
        place = draw.randrange(len(data))
        data[place : place + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
    body = {"document": base64.b64encode(data).decode(), "pages": draw.choice(("1", "1-3", "2,9", "1-99999"))}
    post(port, "/embed", json.dumps(body).encode())


@functools.cache
def _good_documents() -> list[bytes]:
    documents = []
    for kind in ("PDF", "TIFF"):
        first, *others = (picture(300, 400, seed) for seed in range(3))
        documents.append(encoded(first, kind, save_all=True, append_images=others))
    return documents


def media(draw: random.Random, port: int) -> None:
    """A few pictures or clips in one request, in which each fails alone."""
    items = []
    for _ in range(draw.randrange(1, 5)):
        make = draw.choice((damaged, flood, matroska, mp4))
        field = draw.choice(("image", "video")) if make is damaged else "image" if make is flood else "video"
        items.append({field: base64.b64encode(make(draw)).decode()})
    post(port, "/embed", json.dumps({"items": items}).encode())


KINDS: tuple[Callable[[random.Random, int], None], ...] = (media, clips, large, documents)
