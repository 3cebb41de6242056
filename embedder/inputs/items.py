"""JSON of a request -> EmbeddingRequest and its EmbeddingItems, validated.

The wire models (pydantic) stay in this file and in `response`; inside, items are frozen dataclasses. An item is any
mixture of texts, images and videos in the caller's order. What is model-specific (the range of `dimensions`) is
checked by the engine at admission, before any work.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from embedder.errors import InvalidRequest

if TYPE_CHECKING:
    import PIL.Image

    Media = bytes | str | PIL.Image.Image

Truncate = Literal["end", "start", "none"]
EXAMPLE_IMAGE = (  # a red square of 32x32 pixels, PNG in base64
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mN4JqdBU8"
    "QwasGoBaMWjFowasGoBaMWjFowasGoBaMWDBULAK6hsD0HQA3uAAAAAElFTkSuQmCC"
)


@dataclass(frozen=True)
class Text:
    """A run of the caller's text."""

    text: str


@dataclass(frozen=True)
class Image:
    """A picture: encoded bytes, their base64 (bare or as data URI) or URL, or a PIL image (library only)."""

    source: Media


@dataclass(frozen=True)
class Video:
    """A clip: encoded bytes, their base64 (bare or as data URI) or URL, or a list of frames, each given like an image.

    `fps`: frames a second that the list has, or that are looked at of an encoded clip. None: as the reference does.
    """

    source: bytes | str | tuple[Media, ...]
    fps: float | None = None


Part = Text | Image | Video


@dataclass(frozen=True)
class EmbeddingItem:
    """One thing to embed. `instruction` and `dimensions` of None mean the engine's default and the full width.

    `truncate`: what becomes of text that does not fit: its end or its start is cut, or (`none`) the item refused.
    """

    parts: tuple[Part, ...]
    instruction: str | None = None
    dimensions: int | None = None
    normalize: bool = True
    truncate: Truncate = "end"


def describe_value(value: object) -> str:
    """A caller's value for a message: its beginning, and what JSON calls its type."""
    text = repr(value[:61]) if isinstance(value, str) else _SHORT.repr(value)
    return f"{text[:60]}.. ({json_type(value)})" if len(text) > 60 else f"{text} ({json_type(value)})"


_SHORT = reprlib.Repr()  # looks neither deeper nor further than it shows
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxstring = _SHORT.maxother = 64


def json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def item_from_fields(fields: Mapping[str, Any]) -> EmbeddingItem:
    """An item in the native form -> EmbeddingItem.

    Either `text`, `image`, `video` (each one or a list; the model's order is videos, images, texts), or `content`:
    a list of parts `{"type": "text", "text": ..}` in the caller's order. A video is encoded (bytes, base64, data URI)
    or a list of frames, with its `fps` beside it if need be. Optional: `instruction`, `dimensions`, `normalize`,
    `truncate`. Raises `InvalidRequest`.
    """
    if not isinstance(fields, Mapping):
        raise InvalidRequest(f"got {describe_value(fields)}; allowed: a text, or an object with text, image or content")
    fields = without_nulls(fields)
    known = {"text", "image", "video", "content", "instruction", "dimensions", "normalize"}
    known |= {"truncate", "fps"} if "video" in fields else {"truncate"}
    refuse_unknown(fields, known)
    if "content" in fields:
        if {"text", "image", "video"} & set(fields):
            raise InvalidRequest("give either `content` or `text`/`image`/`video`, not both")
        parts = tuple(_part(part) for part in _sequence(fields["content"]))
    else:
        videos = [_video(value, fields.get("fps")) for value in _videos(fields.get("video"))]
        images = [Image(value) for value in _sequence(fields.get("image"))]
        texts = [_text(value) for value in _sequence(fields.get("text"))]
        parts = (*videos, *images, *texts)
    if not isinstance(fields.get("normalize", True), bool):
        raise InvalidRequest(f"normalize: got {describe_value(fields['normalize'])}; allowed: true or false")
    if not parts:
        raise InvalidRequest("an item needs at least one of text, image or video; got none")
    truncate = fields.get("truncate", "end")
    if truncate not in get_args(Truncate):
        raise InvalidRequest(f"truncate: got {describe_value(truncate)}; allowed: {', '.join(get_args(Truncate))}")
    return EmbeddingItem(
        parts, fields.get("instruction"), fields.get("dimensions"), fields.get("normalize", True), truncate
    )


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are given: null means the same as leaving a field out."""
    return {name: value for name, value in fields.items() if value is not None}


def refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    """Raises `InvalidRequest` that names the fields which are not among the known."""
    if unknown := sorted(str(name) for name in set(fields) - known):
        raise InvalidRequest(unknown_fields_message(unknown))


def unknown_fields_message(unknown: Sequence[str]) -> str:
    names = ", ".join(name[:60] for name in unknown[:5])
    return f"extra fields not permitted: {names}" + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")


def _part(part: object) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("text", "image", "video"):
        part = without_nulls(part)
        refuse_unknown(part, {"type", kind, "fps"} if kind == "video" else {"type", kind})
        match kind:
            case "text":
                return _text(part.get("text"))
            case "image":
                return Image(part.get("image"))  # type: ignore[arg-type]  # media says what it may be
            case "video":
                return _video(part.get("video"), part.get("fps"))
    raise InvalidRequest(f"a part of `content` has type text, image or video; got {describe_value(part)}")


def _text(value: object) -> Text:
    if not isinstance(value, str):
        raise InvalidRequest(f"text: got {describe_value(value)}; allowed: a string")
    return Text(value)


def _sequence(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _videos(value: Any) -> Sequence[Any]:
    """One video may be a list of frames, so a list of videos is a list of lists, or holds an encoded clip."""
    if value is None:
        return ()
    is_list_of_videos = isinstance(value, list | tuple) and value and _is_video(value[0])
    return value if is_list_of_videos else (value,)


def _is_video(value: object) -> bool:
    """Not a frame. Bare base64 counts as a frame: a clip among several says what it is in its data URI."""
    return isinstance(value, list | tuple | Video) or (isinstance(value, str) and value.startswith("data:video/"))


def _video(value: Any, fps: Any = None) -> Video:
    if isinstance(value, Video):
        return value
    if not isinstance(value, bytes | str | list | tuple):
        raise InvalidRequest(
            f"video: got {describe_value(value)}; allowed: base64, a data URI, a URL, or a list of frames"
        )
    is_number = isinstance(fps, int | float) and not isinstance(fps, bool)
    if fps is not None and not (is_number and 0.01 <= fps <= 1000):
        raise InvalidRequest(f"fps: got {describe_value(fps)}; allowed: a number from 0.01 to 1000")
    return Video(tuple(value) if isinstance(value, list | tuple) else value, fps)
