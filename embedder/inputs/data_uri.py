"""Data URIs and base64 as clients write them: scheme and parameters in any letter case, whitespace, missing padding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pybase64

from embedder.errors import InvalidMedia
from embedder.inputs.formats import MediaKind, find_format

MAX_HEADER_CHARS = 1024
_TYPE = r'[^\s,;"]+'  # also those that are none, such as `image`: better an error than the vector of its letters
_BLANKS = r"[\s\ufeff\u200b]*"  # editors put the invisible ones before a text
# A header is `data:`, a media type or none, and parameters; a quoted one may hold a comma. No two neighbors can match
# the same blanks or quotes: trying all ways to divide a thousand blanks would block the event loop.
_PARAMETER = r';(?:[^,;"]|"[^"]*"|"(?![^"]*"))*'
_HEADER = re.compile(rf"{_BLANKS}(?P<header>data\s*:\s*(?:{_TYPE}\s*)?(?:{_PARAMETER})*),", re.IGNORECASE)
_MEDIA_TYPE = re.compile(rf"{_BLANKS}data\s*:\s*(image|video)/", re.IGNORECASE)
_FRAMES = re.compile(r"data\s*:\s*video/jpe?g\b", re.IGNORECASE)
_STANDARD = str.maketrans({**dict.fromkeys(" \t\r\n\v\f"), "-": "+", "_": "/"})
_SLICE_CHARS = 2**18  # read at once: each call holds the GIL, a replacement up to 5 ms (one core of an AMD EPYC)
_SNIFFED_CHARS = 512
# What base64 holds that a URL escapes. `unquote`, which decodes all, is Python code: 120 kB of escapes take 5.1 ms
# instead of 0.9 (one core of an AMD EPYC, `python -m benchmarks.micro`).
_ESCAPES = {"%2B": "+", "%2F": "/", "%3D": "=", "%2D": "-", "%5F": "_", "%20": " ", "%0A": "\n", "%0D": "\r"}
MAX_FRAMES = 20_000  # of a list in a data URI; a JSON list may not have many more


def split_data_uri(text: str) -> tuple[str, str, str] | None:
    """Header, comma and content of a data URI; None for another string.

    Of a string that only begins like one of media, everything is the header. The content may have percent escapes,
    which `decode_base64` decodes.
    """
    if (match := _HEADER.match(text, 0, MAX_HEADER_CHARS)) is None:
        return (text, "", "") if _MEDIA_TYPE.match(text, 0, MAX_HEADER_CHARS) else None
    return match["header"].strip(), ",", text[match.end() :]


def is_base64(header: str) -> bool:
    """Whether the header of a data URI says that its content is base64."""
    kind, *parameters = header.lower().split(";")
    return kind == "data:base64" or "base64" in [parameter.strip() for parameter in parameters]


def is_base64_data_uri(text: str) -> bool:
    """Whether a string is a data URI, of any type, that says that its content is base64."""
    match = _HEADER.match(text, 0, MAX_HEADER_CHARS)
    return match is not None and is_base64(match["header"])


def media_kind(text: str) -> MediaKind | None:
    """What a string that may be a data URI holds; None for a text.

    A data URI of any other type, such as application/octet-stream or none, counts as media if it is base64: its first
    bytes tell a video; anything else is an image, or an error where it is decoded.
    """
    if match := _MEDIA_TYPE.match(text, 0, MAX_HEADER_CHARS):
        return "video" if match[1].lower() == "video" else "image"
    if (
        ":" not in text[:MAX_HEADER_CHARS]
        or (parts := split_data_uri(text[: MAX_HEADER_CHARS + _SNIFFED_CHARS])) is None
    ):
        return None
    header, _, content = parts
    if not is_base64(header):
        return None
    try:
        found = find_format(decode_base64(content[: _SNIFFED_CHARS // 4 * 4]))
    except ValueError:
        return "image"
    return "video" if found and found.ffmpeg and not found.pillow else "image"


def video_frames(text: str) -> tuple[str, ...]:
    """The frames of `data:video/jpeg;base64,F1,F2`, vLLM's form of a list of pictures; empty for another string."""
    header, comma, content = split_data_uri(text) or ("", "", "")
    if not comma or not _FRAMES.match(header) or not is_base64(header):
        return ()
    frames = "".join(_unescaped(content, {"%2C": ","})).split(",", MAX_FRAMES)
    if len(frames) > MAX_FRAMES:
        raise InvalidMedia(f"video of more than {MAX_FRAMES} frames in a data URI; allowed: up to {MAX_FRAMES}")
    return tuple(frames)


def decode_base64(text: str) -> bytes:
    """Decode standard or URL-safe base64, also with percent escapes. Raises `ValueError`."""
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one
        if not text.isascii():  # it is no base64, and `translate` would hold the GIL for long
            raise
        slices = []
        for one in _unescaped(text, _ESCAPES):
            if "%" in one:
                raise
            slices.append(one.translate(_STANDARD))
        end = "".join(slices[-2:]).rstrip("=")  # two, since padding can begin in the last but one
        cleaned = "".join([*slices[:-2], end])
        if len(cleaned) % 4 == 1:
            raise
        return pybase64.b64decode(cleaned + "=" * (-len(cleaned) % 4), validate=True)


def _unescaped(text: str, escapes: Mapping[str, str]) -> Iterator[str]:
    """The text in slices, with these percent escapes replaced, in upper and lower case."""
    start = 0
    while start < len(text):
        end = start + _SLICE_CHARS
        if (escape := text.rfind("%", end - 2, end)) > start:  # it may go on in the next slice
            end = escape
        one, start = text[start:end], end
        if "%" in one:
            for escaped, character in escapes.items():
                one = one.replace(escaped, character).replace(escaped.lower(), character)
        yield one
