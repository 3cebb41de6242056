"""Clips that hold FFmpeg for a long time or make it take much memory. The containers are written byte by byte."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import av
import numpy as np
import PIL.Image

# Matroska: elements of an ID, a length and data


def element(element_id: str, data: bytes, length: int | None = None) -> bytes:
    return bytes.fromhex(element_id) + _size(len(data), length) + data


def _size(number: int, length: int | None = None) -> bytes:
    length = length or next(count for count in range(1, 9) if number < (1 << 7 * count) - 1)
    return (number | 1 << 7 * length).to_bytes(length, "big")


def _number(number: int) -> bytes:
    return number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big")


def matroska(*parts: bytes) -> bytes:
    """A Matroska file of one Motion JPEG track, with other elements before its only cluster."""
    header = element("4282", b"matroska") + element("4287", b"\4") + element("4285", b"\2")
    info = element("1549A966", element("2AD7B1", _number(1_000_000)))
    sizes = element("E0", element("B0", _number(64)) + element("BA", _number(64)))
    numbers = element("D7", b"\1") + element("73C5", b"\1") + element("83", b"\1") + element("86", b"V_MJPEG")
    tracks = element("1654AE6B", element("AE", numbers + sizes))
    cluster = element("1F43B675", element("E7", b"\0") + element("A3", b"\x81\0\0\x80" + b"x" * 100))
    return element("1A45DFA3", header) + element("18538067", info + tracks + b"".join(parts) + cluster, 8)


def many_tags(count: int) -> bytes:
    """Tags of different names: FFmpeg searches all of them for each."""
    tags = b"".join(element("67C8", element("45A3", b"%x" % n) + element("4487", b"a")) for n in range(count))
    return matroska(element("1254C367", element("7373", element("63C0", b"") + tags, 8), 8))


def many_attachments(count: int) -> bytes:
    return matroska(element("1941A469", b"\x61\xa7\x80" * count, 8))


def many_chapters(count: int) -> bytes:
    return matroska(element("1043A770", element("45B9", b"\xb6\x80" * count, 8), 8))


def many_cues(count: int) -> bytes:
    return matroska(element("1C53BB6B", b"\xbb\x80" * count, 8))


# MP4: boxes of a length, a kind and data


def box(kind: bytes, *data: bytes) -> bytes:
    content = b"".join(data)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def full_box(kind: bytes, *data: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *data)


def _sample_entry(kind: bytes, more: bytes = b"") -> bytes:
    size = struct.pack(">HHIIIH", 64, 64, 0x480000, 0x480000, 0, 1)
    depth = struct.pack(">Hh", 24, -1)
    return box(kind, bytes(6), b"\0\1", bytes(16), size, bytes(32), depth, more)


def mp4(entry: bytes, more_tables: bytes = b"", more_header: bytes = b"", num_tracks: int = 1) -> bytes:
    tables = box(
        b"stbl",
        full_box(b"stsd", struct.pack(">I", 1), entry),
        full_box(b"stts", struct.pack(">III", 1, 1, 1)),
        full_box(b"stsc", struct.pack(">IIII", 1, 1, 1, 1)),
        full_box(b"stsz", struct.pack(">III", 0, 1, 100)),
        full_box(b"stco", struct.pack(">II", 1, 48)),
        more_tables,
    )
    source = box(b"dinf", full_box(b"dref", struct.pack(">I", 1), full_box(b"url ", flags=1)))
    media = box(
        b"mdia",
        full_box(b"mdhd", struct.pack(">IIIIHH", 0, 0, 1000, 1000, 0, 0)),
        full_box(b"hdlr", bytes(4), b"vide", bytes(13)),
        box(b"minf", full_box(b"vmhd", bytes(8), flags=1), source, tables),
    )
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    head = (struct.pack(">IIIII", 0, 0, 1, 0, 1000), bytes(16), matrix, struct.pack(">II", 64 << 16, 64 << 16))
    track = box(b"trak", full_box(b"tkhd", *head, flags=3), media)
    header = box(
        b"moov", full_box(b"mvhd", struct.pack(">IIII", 0, 0, 1000, 1000), bytes(80)), track * num_tracks, more_header
    )
    return box(b"ftyp", b"isom", bytes(4), b"isom") + box(b"mdat", b"x" * 100) + header


def encrypted_samples(count: int, num_tracks: int = 1) -> bytes:
    """A table of encrypted samples that declares `count` and stores none: about 20 bytes of memory for each."""
    scheme = full_box(b"schm", b"cenc", struct.pack(">I", 0x10000))
    key = full_box(b"tenc", b"\0\0", b"\1\0", bytes(16), b"\x08", bytes(8))
    entry = _sample_entry(b"encv", box(b"sinf", box(b"frma", b"jpeg"), scheme, box(b"schi", key)))
    return mp4(entry, full_box(b"senc", struct.pack(">I", count)), num_tracks=num_tracks)


def many_metadata(count: int) -> bytes:
    """Metadata of different keys: FFmpeg searches all of them for each."""
    keys = b"".join(box(b"mdta", b"%x" % n) for n in range(count))
    values = b"".join(box(struct.pack(">I", n + 1), box(b"data", struct.pack(">II", 1, 0), b"a")) for n in range(count))
    handler = full_box(b"hdlr", bytes(4), b"mdta", bytes(12))
    table = full_box(b"keys", struct.pack(">I", count), keys)
    return mp4(_sample_entry(b"jpeg"), more_header=box(b"meta", handler, table, box(b"ilst", values)))


# Packets


def many_pictures_in_a_packet(count: int, side: int) -> bytes:
    """H.264 whose second packet holds `count` pictures of 29 bytes, side x side pixels: one call decodes all."""
    frame = av.VideoFrame.from_ndarray(np.zeros((side * 3 // 2, side), np.uint8), "yuv420p")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        options = {"preset": "ultrafast", "tune": "zerolatency", "g": "1000"}
        stream = container.add_stream("libx264", rate=1, options=options)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        packets = []
        for number in range(2):
            frame.pts = number
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for number, data in enumerate((bytes(packets[0]), bytes(packets[1]) * count)):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.duration = stream, packets[0].time_base, 1
            packet.pts = packet.dts = number
            packet.is_keyframe = not number
            container.mux(packet)
    return buffer.getvalue()


@cache
def hanging_clip() -> bytes:
    """A clip of which one call of FFmpeg takes hours."""
    return many_pictures_in_a_packet(40_000, 1024)


def random_clip(chooser: random.Random, scale: float = 1.0) -> tuple[str, bytes]:
    """A clip of a random kind and size: its name and bytes. `scale`: of the largest counts."""
    kinds: dict[str, tuple[Callable[[int], bytes], int, int]] = {
        "tags": (many_tags, 20_000, 300_000),
        "attachments": (many_attachments, 100_000, 15_000_000),
        "chapters": (many_chapters, 100_000, 15_000_000),
        "cues": (many_cues, 100_000, 15_000_000),
        "metadata": (many_metadata, 20_000, 300_000),
        "encrypted samples": (lambda n: encrypted_samples(n, chooser.randint(1, 6)), 1_000_000, 200_000_000),
        "pictures in a packet": (lambda n: many_pictures_in_a_packet(n, 16 * chooser.randint(10, 60)), 5000, 50_000),
    }
    name = chooser.choice(list(kinds))
    make, least, most = kinds[name]
    count = int(scale * least * (most / least) ** chooser.random())
    return f"{count} {name}", make(count)


def clip_of_two_sizes() -> bytes:
    """Motion JPEG whose frames have 64x64 pixels, and later 96x64, as recordings of calls have."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for number in range(12):
            picture = io.BytesIO()
            PIL.Image.new("RGB", (64 if number < 6 else 96, 64)).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, 4), 1
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return buffer.getvalue()
