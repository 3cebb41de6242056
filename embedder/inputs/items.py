"""What a caller asks to embed -> EmbeddingItem, validated.

An item is any mixture of texts, images and videos, in the caller's order. An `EmbeddingItem` that exists is valid in
everything that can be checked without the settings, the model and decoding. The range of `dimensions` depends on the
model, and the engine checks it when the item is submitted.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import PIL.Image

from embedder.errors import InvalidMedia, InvalidRequest, UnsupportedDimensions
from embedder.inputs.data_uri import is_base64_data_uri, media_kind, video_frames
from embedder.inputs.formats import MediaKind

Media = bytes | str | PIL.Image.Image
Truncate = Literal["end", "start", "none"]

EXAMPLE_IMAGE = (  # a red square of 32x32 pixels, PNG in base64
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mN4JqdBU8"
    "QwasGoBaMWjFowasGoBaMWjFowasGoBaMWDBULAK6hsD0HQA3uAAAAAElFTkSuQmCC"
)
EXAMPLE_DATA_URI = f"data:image/png;base64,{EXAMPLE_IMAGE}"
_TRUNCATE = get_args(Truncate)


@dataclass(frozen=True, slots=True)
class Text:
    """A text of the caller: valid Unicode, possibly empty, and not the data URI of a file."""

    text: str

    def __post_init__(self) -> None:
        check_text("text", self.text)
        if is_base64_data_uri(self.text):  # its vector would be that of random letters
            raise InvalidRequest(
                f"text: got a data URI with base64, {self.text.strip()[:40]!r}; allowed: a text. Send a picture as "
                "`image`, a clip as `video`"
            )


@dataclass(frozen=True, slots=True)
class Image:
    """An image: encoded bytes, their base64 (bare or as data URI), a URL, or (in Python only) a PIL image."""

    source: Media

    def __post_init__(self) -> None:
        _check_media("image", self.source)


@dataclass(frozen=True, slots=True)
class Video:
    """A video: encoded bytes, their base64 (bare or as data URI), a URL, or a tuple of frames, each given as an image.

    `fps`: frames per second of a list of frames, or the sampling rate of an encoded video. None: the reference's.
    `segment`: start and end in seconds of the part of an encoded video to embed, as if only that had been sent (in
    Python only). None: all of it.
    """

    source: bytes | str | tuple[Media, ...]
    fps: float | None = None
    segment: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, tuple):
            for frame in self.source:
                _check_media("image", frame)
        else:
            _check_media("video", self.source)
        check_fps(self.fps)
        if self.segment is not None and (isinstance(self.source, tuple) or not 0 <= self.segment[0] < self.segment[1]):
            raise InvalidRequest(
                f"segment: got {self.segment}; allowed: a start of at least 0 s and a later end, of an encoded video"
            )


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class EmbeddingItem:
    """One thing to embed.

    `instruction` None: the service's default instruction. `dimensions` None: all values of the model's vector.
    `truncate`: for text over the token limit, cut its end or its start, or (`none`) refuse the item. `max_text_tokens`:
    tokens that the item's text is cut to; None: only the limit of the settings.
    Raises `InvalidRequest` and `UnsupportedDimensions`.
    """

    parts: tuple[Part, ...]
    instruction: str | None = None
    dimensions: int | None = None
    normalize: bool = True
    truncate: Truncate = "end"
    max_text_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise InvalidRequest("an item needs at least one of text, image or video; got none")
        if not any(part.text if isinstance(part, Text) else True for part in self.parts):
            raise InvalidRequest("text is empty; allowed: at least one character")
        if self.instruction is not None:
            check_text("instruction", self.instruction)
        if self.dimensions is not None:
            _check_dimensions(self.dimensions)
        if not isinstance(self.normalize, bool):
            raise InvalidRequest(f"normalize: got {describe_value(self.normalize)}; allowed: true or false")
        if self.truncate not in _TRUNCATE:
            raise InvalidRequest(f"truncate: got {describe_value(self.truncate)}; allowed: {', '.join(_TRUNCATE)}")
        if self.max_text_tokens is not None and (type(self.max_text_tokens) is not int or self.max_text_tokens < 1):
            raise InvalidRequest(
                f"max_text_tokens: got {describe_value(self.max_text_tokens)}; allowed: a positive whole number"
            )


# The parameters of the checks are `object`: callers send values of any type.


def check_text(name: str, text: object) -> None:
    """Raises `InvalidRequest` unless the value is a string of valid Unicode. `name`: the value's, for the message."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{name}: got {describe_value(text)}; allowed: a string")
    if not text.isascii():  # ASCII is valid, and need not be copied
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{name} holds a lone surrogate, which is not Unicode text: {text[error.start]!a} at character "
                f"{error.start}"
            ) from error


def check_fps(fps: object) -> None:
    """Raises `InvalidRequest` unless the value is None or a rate in range."""
    if fps is not None and not (isinstance(fps, int | float) and not isinstance(fps, bool) and 0.01 <= fps <= 1000):
        raise InvalidRequest(f"fps: got {describe_value(fps)}; allowed: a number from 0.01 to 1000")


def _check_media(kind: MediaKind, source: object) -> None:
    if isinstance(source, bytes | str) or (kind == "image" and isinstance(source, PIL.Image.Image)):
        return
    other = "a PIL image" if kind == "image" else "a list of frames"
    raise InvalidMedia(f"{kind}: got {describe_value(source)}; allowed: base64, a data URI, a URL, bytes or {other}")


def _check_dimensions(dimensions: object) -> None:
    if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1:
        raise UnsupportedDimensions(
            f"dimensions: got {describe_value(dimensions)}; allowed: a positive whole number, at most the model's "
            "hidden_size"
        )


def item_from_fields(fields: Mapping[str, Any]) -> EmbeddingItem:
    """An item as a mapping, the native form -> EmbeddingItem.

    Either `text`, `image`, `video` (each one value or a list; the model sees videos, then images, then texts), or
    `content`: a list of parts such as `{"type": "text", "text": ..}` in the caller's order. A video is encoded or a
    list of frames; `fps` goes with it. Optional: `instruction`, `dimensions`, `normalize`, `truncate`.
    Raises `InvalidRequest`.
    """
    if not isinstance(fields, Mapping):
        raise InvalidRequest(f"got {describe_value(fields)}; allowed: a text, or an object with text, image or content")
    fields = without_nulls(fields)
    refuse_unknown(fields, _FIELDS | {"fps"} if "video" in fields else _FIELDS)
    if "content" in fields:
        if {"text", "image", "video"} & set(fields):
            raise InvalidRequest("got `content` and `text`/`image`/`video`; allowed: one of the two forms")
        parts = tuple(_part(part) for part in _as_list(fields["content"]))
    else:
        videos = [_video(value, fields.get("fps")) for value in _as_list_of_videos(fields.get("video"))]
        images = [Image(value) for value in _as_list(fields.get("image"))]
        texts = [Text(value) for value in _as_list(fields.get("text"))]
        parts = (*videos, *images, *texts)
    options = {name: value for name, value in fields.items() if name in _OPTIONS}
    if isinstance(options.get("truncate"), str):
        options["truncate"] = options["truncate"].lower()
    return EmbeddingItem(parts, **options)


_OPTIONS = {"instruction", "dimensions", "normalize", "truncate", "max_text_tokens"}
_FIELDS = {"text", "image", "video", "content", *_OPTIONS}


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are given: null means the same as leaving a field out."""
    return {name: value for name, value in fields.items() if value is not None}


def refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    """Raises `InvalidRequest` that names the unknown fields, if there are any."""
    if unknown := [str(name) for name in fields if name not in known]:
        raise InvalidRequest(unknown_fields_message(unknown, known))


def unknown_fields_message(unknown: Sequence[str], known: Iterable[str]) -> str:
    """Message that names up to five unknown fields, and for two of them the known name that is most like it, if one is.

    To look for one among 8 takes 0.02 ms of the event loop, for each of a request's items (one core of an AMD EPYC,
    `python -m benchmarks.micro`).
    """
    names = ", ".join([*(_with_nearest(name, known) for name in unknown[:2]), *map(_shown, unknown[2:5])])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return f"unknown field{'s' if len(unknown) > 1 else ''}: {names}{more}"


def _with_nearest(name: str, known: Iterable[str]) -> str:
    shown = _shown(name)
    nearest = difflib.get_close_matches(shown.lower(), known, n=1, cutoff=0.7)
    return f"{shown} (did you mean {nearest[0]}?)" if nearest else shown


def _shown(name: str) -> str:
    return name[:60].encode("ascii", "backslashreplace").decode() if not name.isprintable() else name[:60]


def describe_value(value: object) -> str:
    """A caller's value for a message: its first 60 characters, and the name of its JSON type."""
    if value is None:
        return "null"
    text = repr(value[:61]) if isinstance(value, str) else json_value(value)
    return f"{text[:60]}.. ({json_type(value)})" if len(text) > 60 else f"{text} ({json_type(value)})"


def json_value(value: object) -> str:
    """A value of JSON for a message, shortened if it is large: Python's form, but with `true`, `false` and `null`."""
    return _SHORT.repr(value)


class _JsonRepr(reprlib.Repr):
    """Stops early: the repr of a large or deep value takes seconds."""

    def repr_bool(self, value: object, _: int) -> str:
        return "true" if value else "false"

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        return super().repr_dict(dict(islice(value.items(), self.maxdict + 1)), level)  # it would sort all keys

    def repr_NoneType(self, *_: object) -> str:  # noqa: N802 - the name of the type
        return "null"


_SHORT = _JsonRepr()
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxstring = _SHORT.maxother = 64


def json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _part(part: object) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    kind = kind.lower() if isinstance(kind, str) else kind
    if isinstance(part, Mapping) and kind in ("text", "image", "video"):
        part = without_nulls(part)
        refuse_unknown(part, {"type", kind, "fps"} if kind == "video" else {"type", kind})
        value: Any = part.get(kind)
        match kind:
            case "text":
                return Text(value)
            case "image":
                return Image(value)
            case "video":
                return _video(value, part.get("fps"))
    raise InvalidRequest(
        f"a part of `content`: got {describe_value(part)}; allowed: an object of type text, image or video"
    )


def _as_list(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _as_list_of_videos(value: Any) -> Sequence[Any]:
    """A list of frames is one video, so a list of videos holds lists or encoded videos."""
    if value is None:
        return ()
    is_list_of_videos = isinstance(value, list | tuple) and value and _is_video(value[0])
    return value if is_list_of_videos else (value,)


def _is_video(value: object) -> bool:
    """Whether an entry of a list is a video and not a frame. Bare base64 is a frame; an encoded video is a data URI."""
    return isinstance(value, list | tuple | Video) or (isinstance(value, str) and media_kind(value) == "video")


def _video(value: Any, fps: Any) -> Video:
    if isinstance(value, Video):
        return value
    if isinstance(value, str) and (frames := video_frames(value)):
        return Video(frames, fps)
    return Video(tuple(value) if isinstance(value, list) else value, fps)
