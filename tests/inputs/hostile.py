"""Hostile images, videos, items and bodies. The service must refuse each with an error code."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import av
import PIL.Image

from embedder.inputs.items import EXAMPLE_IMAGE, describe_value
from tests.conftest import encoded, picture

GOOD_BODIES: dict[str, dict[str, Any]] = {
    "/txt/embed": {"input": "red"},
    "/img/embed": {"input": EXAMPLE_IMAGE},
    "/embed": {"items": ["red"]},
    "/v1/embeddings": {"input": "red"},
    "/v2/embed": {"texts": ["red"]},
    "/embed_texts": {"texts": ["red"]},
    "/embed_images": {"images": [EXAMPLE_IMAGE]},
}
DEEP = json.loads("[" * 500 + "]" * 500)
WRONG: dict[str, list[Any]] = {  # values that no route accepts in the field of that name
    "input": [5, True, {}, [], [5], [None], [[]], [[[]]], 1e300, DEEP, ["a"] * 2049, ["a"] * 51_300],
    "items": ["red", 5, {}, [], ["a"] * 2049, DEEP, [DEEP]],
    "texts": ["red", 5, {}, [], [5], [None], ["a"] * 2049],
    "images": ["red", 5, {}, [], [5], [None], [EXAMPLE_IMAGE[:20]], [EXAMPLE_IMAGE] * 2049],
    "inputs": [5, {}, [], [5], [{}], [{"content": 5}], [{"content": [DEEP]}], [{"content": [{"type": DEEP}]}]],
    "messages": [5, {}, [], [5], [{}], [DEEP], [{"role": DEEP, "content": "a"}], [{"role": "a" * 999, "content": "a"}]],
    "dimensions": [0, -1, 63, 10**6, 64.5, "64", True, [], {}, DEEP, 1e300, -(2**63)],
    "output_dimension": [0, 10**6, "64", True, DEEP],
    "instruction": [5, True, [], {}, DEEP],
    "normalize": ["true", 1, [], {}, DEEP],
    "encoding_format": ["int", 5, [], {}, DEEP],
    "output_dtype": ["int4", 5, [], {}, DEEP],
    "truncate": ["middle", 5, [], {}, DEEP],
    "input_type": ["other", 5, [], {}, DEEP],
    "embedding_types": ["float", [], ["int4"], [5], 5, {}, DEEP],
    "max_tokens": [0, -2, "x", [], {}, 1e300],
    "truncate_prompt_tokens": [0, -2, "x", [], {}, 1e300],
    "instrction": ["Find it.", DEEP],
}
FIELDS = {
    "/txt/embed": ["input", "dimensions", "instruction", "normalize", "encoding_format", "output_dtype", "truncate"],
    "/img/embed": ["input", "instrction"],
    "/embed": ["items", "dimensions", "instruction", "normalize", "encoding_format", "output_dtype", "truncate"],
    "/v1/embeddings": ["input", "messages", "dimensions", "instruction", "input_type", "truncate_prompt_tokens"],
    "/v2/embed": ["texts", "images", "inputs", "output_dimension", "input_type", "embedding_types", "max_tokens"],
    "/embed_texts": ["texts"],
    "/embed_images": ["images"],
}
SOURCES = ("input", "items", "messages", "texts", "images", "inputs")  # a body has one of them
MANY = 2**26 - 100  # bytes, nearly the limit of a body


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, pixels: bytes = b"", bit_depth: int = 8, color_type: int = 2, more: bytes = b""
) -> bytes:
    """A PNG, with `more` chunks between its header and its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + pixels + chunk(b"IEND", b"")


def gif_of_comments(image: PIL.Image.Image) -> bytes:
    """A GIF with 1000 comments before its picture, each of which Pillow reads in Python."""
    data = encoded(image, "GIF")
    start = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    return data[:start] + b"!\xfe\1a\0" * 1000 + data[start:]


def rle_bmp(width: int, height: int) -> bytes:
    """A BMP whose pixels Pillow decodes in Python."""
    runs = b"".join(bytes([min(255, width - start), 1]) for start in range(0, width, 255))
    rows = (runs + b"\0\0") * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + bytes(1024) + rows


def jpeg_of_scans(image: PIL.Image.Image, num_scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan `num_scans` times: each costs a pass over all pixels."""
    data = encoded(image.convert("L"), "JPEG", progressive=True, quality=50)
    last = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))
    return data[:-2] + data[last:-2] * num_scans + data[-2:]


def avif_of(image: PIL.Image.Image, change: Callable[[bytes], bytes]) -> bytes:
    """An AVIF whose AV1 data is changed."""
    data = encoded(image, "AVIF", speed=10)
    head, _, coded = data.rpartition(b"mdat")
    changed = change(coded)
    head = head[:-4].replace(struct.pack(">I", len(coded)), struct.pack(">I", len(changed)))
    return head + struct.pack(">I", len(changed) + 8) + b"mdat" + changed


def avif_of_frames(image: PIL.Image.Image, num_frames: int) -> bytes:
    """An AVIF whose picture is `num_frames` equal frames. Each takes the time of a picture, and one of them is used."""

    def repeat(coded: bytes) -> bytes:
        start = 2 + 2 + coded[3]  # after the temporal delimiter and the sequence header
        return coded[:start] + coded[start:] * num_frames

    return avif_of(image, repeat)


def pictures() -> Iterator[tuple[str, bytes | str]]:
    """Encoded pictures, or strings in place of their base64."""
    image = picture(64, 48)
    files = {
        kind: encoded(image, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF", "TIFF", "ICO", "HEIF")
    }
    files["progressive JPEG"] = encoded(image, "JPEG", progressive=True)
    yield from _cut(files)
    for kind, data in files.items():
        yield f"{kind} with a wrong first byte", b"\xfe" + data[1:]
        yield f"{kind} after the first line of a PDF", b"%PDF-1.7\n" + data
        yield f"{kind} in base64 twice", base64.b64encode(base64.b64encode(data)).decode()
        yield f"{kind} by a path", f"/tmp/picture.{kind}"
    for kind in ("PPM", "TGA", "PCX", "DDS", "SGI", "JPEG2000", "PDF", "EPS", "ICNS"):
        yield f"a {kind}", encoded(image, kind)
    large = zlib.compress(b"x" * 10**8)
    yield from {
        "PNG of 900 million pixels": png(30_000, 30_000),
        "PNG of a little too many": png(7072, 7072),
        "PNG of 2**62 pixels": png(2**31 - 1, 2**31 - 1),
        "PNG of no pixels": png(0, 0),
        "PNG without its pixels": png(64, 64),
        "PNG of an odd bit depth": png(64, 64, bit_depth=3),
        "PNG of an odd color type": png(64, 64, color_type=5),
        "PNG with a text of 100 MB": png(64, 64, more=chunk(b"zTXt", b"a\0\0" + large)),
        "PNG with a profile of 100 MB": png(64, 64, more=chunk(b"iCCP", b"a\0\0" + large)),
        "PNG with an international text of 100 MB": png(64, 64, more=chunk(b"iTXt", b"a\0\1\0\0\0" + large)),
        "PNG of endless chunks": png(64, 64, more=chunk(b"tEXt", b"a\0b") * 50_000),
        "PNG whose chunk is longer than the file": png(64, 64)[:33] + struct.pack(">I", 2**31 - 1) + b"IDATabc",
        "JPEG of 65,500 x 65,500": _with_size(files["JPEG"], 65_500, 65_500),
        "JPEG of no pixels": _with_size(files["JPEG"], 0, 0),
        "JPEG of 200 scans": jpeg_of_scans(image, 200),
        "GIF of 65,535 x 65,535": files["GIF"][:6] + b"\xff" * 4 + files["GIF"][10:],
        "BMP of 2**62 pixels": files["BMP"][:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + files["BMP"][26:],
        "BMP of negative width": files["BMP"][:18] + struct.pack("<i", -64) + files["BMP"][22:],
        "PNG with the content of a JPEG": files["PNG"][:8] + files["JPEG"],
        "JPEG with the content of a PNG": files["JPEG"][:4] + files["PNG"],
        "RIFF file that is a WAV": b"RIFF\x24\x00\x00\x00WAVEfmt " + b"\0" * 40,
        "RIFF file that is an AVI": b"RIFF\x24\x00\x00\x00AVI LIST" + b"\0" * 40,
        "one pixel": encoded(picture(1, 1)),
        "one pixel high": encoded(picture(100, 1)),
        "1 to 500": encoded(picture(2, 1000)),
        "PNG in gzip": gzip.compress(files["PNG"]),
        "PNG in bzip2": bz2.compress(files["PNG"]),
        "PNG in xz": lzma.compress(files["PNG"]),
        "PNG in a ZIP archive": _zipped(files["PNG"]),
        "a pickle": pickle.dumps({"image": files["PNG"]}),
        "an ELF program": b"\x7fELF" + b"\0" * 60,
        "PostScript": b"%!PS-Adobe-3.0\n(%pipe%id) (r) file",
        "SVG that reads a file": b'<svg xmlns:xlink="x"><image xlink:href="file:///etc/passwd"/></svg>',
        "XML of a billion laughs": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbb">]><svg>&b;</svg>',
        "ImageMagick's language": b"push graphic-context\nfill 'url(https://127.0.0.1/\"|id\")'\n",
        "an MPEG stream": b"\x00\x00\x01\xba" + b"\0" * 60,
        "one byte": b"\x89",
        "zeros": bytes(10_000),
        "nothing": "",
        "blank": " \n\t ",
        "a URL": "http://127.0.0.1/a.png",
        "a secure URL": "https://169.254.169.254/latest/meta-data",
        "a file's URL": "file:///etc/passwd",
        "a data URI without base64": "data:image/png,abc",
        "a data URI of text": "data:text/html;base64,PGI+",
        "a data URI of nothing": "data:",
        "only padding": "====",
        "too little padding": "AAAAA",
        "the other alphabet": "_-_-",
        "letters of Greece": "αβγδ",
        "NUL": "AAAA\0AAA",
    }.items()


def videos() -> dict[str, bytes]:
    """Two seconds in each container format."""
    return {kind: _video(kind, codec) for kind, codec in (("mp4", "mpeg4"), ("matroska", "mjpeg"), ("gif", "gif"))}


def clips() -> Iterator[tuple[str, bytes | str | list[str]]]:
    """Encoded clips, strings in place of their base64, or lists of frames."""
    files = videos()
    yield from _cut(files)
    small, wide = (base64.b64encode(encoded(picture(width, 32))).decode() for width in (32, 96))
    large = base64.b64encode(png(7072, 7072)).decode()
    yield "MP4 whose box is longer than the file", struct.pack(">I", 2**31 - 1) + files["mp4"][4:]
    sizes = files["mp4"].index(b"stsz")
    many = files["mp4"][: sizes + 8] + struct.pack(">II", 1, 60_000_000) + files["mp4"][sizes + 16 :]
    yield "MP4 of 60 million frames", many
    yield "a playlist", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    yield "FFmpeg's own language", b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield "a picture", encoded(picture(64, 64))
    yield "no frames", []
    yield "769 frames", [small] * 769
    yield "frames of two sizes", [small, wide]
    yield "frames of 50 million pixels and more", [large] * 64
    yield "a frame that is not an image", [small, "AAAA"]


def items() -> Iterator[tuple[str, Any]]:
    """Invalid entries of `/embed`."""
    for entry in (
        *(5, None, True, [], {}, DEEP, {"txt": "a"}, {"a" * 100_000: 1}, {str(number): 1 for number in range(1000)}),
        *({"text": value} for value in (5, "", {}, DEEP, "a" * 200_001, ["a" * 50_000] * 5)),
        *({"image": value} for value in (5, {}, DEEP, [EXAMPLE_IMAGE] * 1500)),
        *({"video": value} for value in (5, {}, [[]])),
        *({"content": value} for value in (5, [], DEEP, [{"type": "sound"}], [{"type": "text"}], [{"type": DEEP}])),
        *({"text": "a", **more} for more in ({"content": []}, {"dimensions": 5}, {"dimensions": DEEP}, {"id": []})),
        *({"text": "a", **more} for more in ({"truncate": "x"}, {"normalize": 5}, {"instruction": 5}, {"fps": 1})),
        {"video": [EXAMPLE_IMAGE], "fps": 0},
    ):
        yield describe_value(entry), entry


def bodies() -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Name, path, body and headers."""
    for path, fields in GOOD_BODIES.items():
        for field in FIELDS[path]:
            for number, value in enumerate(WRONG[field]):
                if value == [] and path in ("/embed_texts", "/embed_images"):
                    continue  # BentoML's batching answers no rows with no vectors
                others = {} if field in SOURCES else fields
                body = json.dumps({**others, field: value}).encode()
                yield f"{path}: {field} {number}", path, body, {}
        good = json.dumps(fields).encode()
        for name, body in _broken(good):
            yield f"{path}: {name}", path, body, {}
        for name, headers, body in (
            ("gzip that is cut off", {"content-encoding": "gzip"}, gzip.compress(good)[:-9]),
            ("gzip of gzip", {"content-encoding": "gzip, gzip"}, gzip.compress(gzip.compress(good))),
            ("another charset", {"content-type": "application/json; charset=latin1"}, good),
            ("a compression bomb", {"content-encoding": "gzip"}, gzip.compress(b"[" * 10**6)),
            ("a form", {"content-type": "application/x-www-form-urlencoded"}, b"input=red"),
            ("parts", {"content-type": "multipart/form-data; boundary=x"}, b"--x"),
            ("a pickle", {"content-type": "application/vnd.bentoml+pickle"}, pickle.dumps(fields)),
        ):
            yield f"{path}: {name}", path, body, headers


# Bodies of nearly the largest allowed size, for any route
LARGE_BODIES: dict[str, Callable[[], bytes]] = {
    "deep": lambda: b'{"input":' + b"[" * (MANY - 20),
    "a list of many": lambda: b'{"input":[' + b'"a",' * (MANY // 4) + b'"a"]}',
    "a list of many numbers": lambda: b'{"input":[' + b"1," * (MANY // 2 - 20) + b"1]}",
    "the same key": lambda: b"{" + b'"input":"a",' * (MANY // 12 - 20) + b'"input":5}',
    "one string": lambda: b'{"input":"' + b"a" * (MANY - 20) + b'"}',
    "one string of commas": lambda: b'{"input":"' + b",\\n" * (MANY // 3 - 20) + b'"}',
    "one number": lambda: b'{"input":' + b"9" * (MANY - 20) + b"}",
    "blanks": lambda: b'{"input":' + b" " * (MANY - 20) + b"5}",
}


def _broken(good: bytes) -> Iterator[tuple[str, bytes]]:
    for tenth in range(10):
        yield f"cut at {tenth}/10", good[: len(good) * tenth // 10]
    head = good[: good.index(b":") + 1]
    for name, value in {
        "NaN": b"NaN",
        "Infinity": b"-Infinity",
        "a number beyond numbers": b"1e999",
        "a very long number": b"9" * 10_000,
        "a lone surrogate": b'"\\ud800"',
        "a lone surrogate in bytes": b'"\xed\xa0\x80"',
        "no UTF-8": b'"\xff\xfe"',
        "a control character": b'"\x00"',
        "deep, but for a parser not too deep": b"[" * 1000 + b"]" * 1000,
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "a comment": b'"a" /* b */',
        "one quote": b"'a'",
        "a comma too many": b'["a",]',
    }.items():
        yield name, head + value + b"}"
    yield "UTF-16", good.decode().encode("utf-16")
    yield "two bodies", good + good
    for value in (b"null", b"5", b"[]", b'"red"', b"true"):
        yield value.decode(), value


def _cut(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for kind, data in files.items():
        for tenth in range(1, 10):
            yield f"{kind} cut at {tenth}/10", data[: len(data) * tenth // 10]


def _with_size(jpeg: bytes, width: int, height: int) -> bytes:
    frame = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:frame] + struct.pack(">HH", height, width) + jpeg[frame + 4 :]


def _zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", data)
    return buffer.getvalue()


def _video(container_format: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for seed in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(64, 48, seed))))
        container.mux(stream.encode())
    return buffer.getvalue()
