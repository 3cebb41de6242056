"""The file formats of images and videos: names, suffixes, signatures, and which library decodes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MediaKind = Literal["image", "video"]

_SIGNATURE_BYTES = 256


@dataclass(frozen=True)
class FileFormat:
    """One row of the table.

    `signature`: regular expression that the first bytes match. `pillow`: Pillow's name where the format is decoded as
    an image. `ffmpeg`: name of FFmpeg's demuxer where it is decoded as a video.
    """

    name: str
    description: str
    signature: bytes
    suffixes: tuple[str, ...] = ()
    pillow: str = ""
    ffmpeg: str = ""


_FORMATS = (  # the first that matches counts
    FileFormat("JPEG", "a JPEG image", rb"\xff\xd8\xff", (".jpg", ".jpeg"), pillow="JPEG"),
    FileFormat("PNG", "a PNG image", rb"\x89PNG\r\n\x1a\n", (".png",), pillow="PNG"),
    FileFormat("WebP", "a WebP image", rb"RIFF.{4}WEBP", (".webp",), pillow="WEBP"),
    FileFormat("GIF", "a GIF image", rb"GIF8[79]a", (".gif",), pillow="GIF", ffmpeg="gif"),
    FileFormat("BMP", "a BMP image", rb"BM.{12}[\x0c\x28\x38\x40\x6c\x7c]\0\0\0", (".bmp",), pillow="BMP"),
    FileFormat("AVIF", "an AVIF image", rb".{4}ftyp(avi[fs]|m[is]f1.{4}(.{4})*?avi[fs])", (".avif",), pillow="AVIF"),
    # A file named .tif is a document with pages, see `embedder.documents`; as an item, it is its first page.
    FileFormat("TIFF", "a TIFF image", rb"II[*+]\0|MM\0[*+]", pillow="TIFF"),
    FileFormat("ICO", "an ICO image", rb"\0\0\x01\0[^\0]", (".ico",), pillow="ICO"),
    FileFormat("HEIC", "a HEIC image", rb".{4}ftyp(hei[cxms]|hev[cxms]|m[is]f1)", (".heic", ".heif"), pillow="HEIF"),
    FileFormat("MP4", "an MP4 video", rb".{4}ftyp(?!qt)", (".mp4",), ffmpeg="mov"),
    FileFormat("MOV", "a MOV video", rb".{4}(ftyp|moov|mdat|wide|free|skip)", (".mov",), ffmpeg="mov"),
    FileFormat("WebM", "a WebM video", rb"\x1aE\xdf\xa3.{,64}webm", (".webm",), ffmpeg="matroska"),
    FileFormat("Matroska", "a Matroska video", rb"\x1aE\xdf\xa3", (".mkv",), ffmpeg="matroska"),
    FileFormat("AVI", "an AVI video", rb"RIFF.{4}AVI "),
    FileFormat("PDF", "a PDF document", rb"\s*%PDF"),
    FileFormat("SVG", "an SVG drawing", rb"\s*<svg"),
    FileFormat("XML", "an XML or SVG document", rb"\s*<\?xml"),
    FileFormat("HTML", "an HTML page", rb"\s*<(!DO|htm)"),
    FileFormat("ZIP", "a ZIP archive or office document", rb"PK\x03\x04"),
)
IMAGE_FORMATS = tuple(one for one in _FORMATS if one.pillow)
VIDEO_FORMATS = tuple(one for one in _FORMATS if one.ffmpeg)
VIDEO_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores", "gif")  # FFmpeg's names

IMAGE_SUFFIXES = tuple(suffix for one in IMAGE_FORMATS for suffix in one.suffixes)
# A file named .gif counts as an image; sent as a video, a GIF is decoded as one.
VIDEO_SUFFIXES = tuple(suffix for one in VIDEO_FORMATS for suffix in one.suffixes if suffix not in IMAGE_SUFFIXES)


def find_format(data: bytes) -> FileFormat | None:
    """The format that the first bytes of a file show, whether or not it is decoded here."""
    start = data[:_SIGNATURE_BYTES]
    return next((one for one in _FORMATS if re.match(one.signature, start, re.DOTALL)), None)


def unsupported_format(kind: MediaKind, data: bytes) -> str:
    """Error message for bytes that are not in a format of this kind: what is allowed, and what the bytes are."""
    found = find_format(data)
    if found in (IMAGE_FORMATS if kind == "image" else VIDEO_FORMATS):
        return f"{kind}: {found.description} that is damaged, or of a variant that is not decoded"
    found_instead = f", but {found.description}" if found else ""
    start = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data[:12])
    return f"{kind}: not a {_allowed_names(kind)} file{found_instead} (starts with {start!r})"


def _allowed_names(kind: MediaKind) -> str:
    *names, last = (one.name for one in (IMAGE_FORMATS if kind == "image" else VIDEO_FORMATS))
    return f"{', '.join(names)} or {last}"
