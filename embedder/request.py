"""JSON of a request -> EmbeddingRequest and its EmbeddingItems, validated.

The wire models (pydantic) stay in this file and in `response`; inside, items are frozen dataclasses. An item is any
mixture of texts, images and videos in the caller's order. What is model-specific (the range of `dimensions`) is
checked by the engine at admission, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import orjson
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictBool, ValidationError, WithJsonSchema

from embedder.errors import InvalidRequest, RequestTooLarge
from embedder.settings import Settings

if TYPE_CHECKING:
    import PIL.Image

    Media = bytes | str | PIL.Image.Image

EncodingFormat = Literal["float", "base64"]
# Of any type on the wire: the engine's check names the range of this model, whatever was sent.
AnyDimensions = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})]
Wire = TypeVar("Wire", bound=BaseModel)


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
    """A picture: encoded bytes, their base64 (bare or as data URI), or a PIL image (library only)."""

    source: Media


@dataclass(frozen=True)
class Video:
    """A clip as a list of frames, each given like an image, `fps` frames a second."""

    frames: tuple[Media, ...]
    fps: float = 2.0  # the reference's rate for frame lists (qwen-vl-utils 0.0.14, `fetch_video`)


Part = Text | Image | Video


@dataclass(frozen=True)
class EmbeddingItem:
    """One thing to embed. `instruction` and `dimensions` of None mean the engine's default and the full width."""

    parts: tuple[Part, ...]
    instruction: str | None = None
    dimensions: int | None = None
    normalize: bool = True


@dataclass(frozen=True)
class EmbeddingRequest:
    """One HTTP body. `is_list` says whether the answer has the shape of a list."""

    items: tuple[EmbeddingItem, ...]
    is_list: bool
    encoding_format: EncodingFormat


class _Options(BaseModel):
    """What both routes of the `local` schema take beside `input`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: str | None = Field(None, description="The task, as the system message; default: the service's.")
    dimensions: AnyDimensions = Field(
        None,
        validation_alias=AliasChoices("dimensions", "dim", "dimension", "output_dimension"),
        description="Matryoshka size: the first values of the vector, brought to unit length again.",
    )
    normalize: StrictBool = Field(True, description="Divide the vector by its length.")
    encoding_format: EncodingFormat = Field(
        "float", description="`base64` answers little-endian float32 bytes in base64."
    )


_INPUT_NAMES = AliasChoices("input", "inputs", "content", "contents")


class TextRequest(_Options):
    """Body of `POST /txt/embed`."""

    input: str | Annotated[list[str], Field(min_length=1)] = Field(
        validation_alias=_INPUT_NAMES,
        description="One text, or several; `embedding` has the same shape.",
        examples=["red"],
    )


class ImageRequest(_Options):
    """Body of `POST /img/embed`."""

    input: str | Annotated[list[str], Field(min_length=1)] = Field(
        validation_alias=_INPUT_NAMES,
        description="One image in base64 (bare or as a data URI), or several; `embedding` has the same shape.",
        examples=[EXAMPLE_IMAGE],
    )


def parse_text_request(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/txt/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(_validate(TextRequest, body), Text, settings)


def parse_image_request(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/img/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(_validate(ImageRequest, body), Image, settings)


def _request(wire: TextRequest | ImageRequest, part: type[Text] | type[Image], settings: Settings) -> EmbeddingRequest:
    inputs = wire.input if isinstance(wire.input, list) else [wire.input]
    if len(inputs) > settings.max_items_per_request:
        raise RequestTooLarge(f"got {len(inputs)} items; allowed: 1 to {settings.max_items_per_request}")
    items = tuple(EmbeddingItem((part(value),), wire.instruction, wire.dimensions, wire.normalize) for value in inputs)
    return EmbeddingRequest(items, isinstance(wire.input, list), wire.encoding_format)


def _validate(model: type[Wire], body: bytes) -> Wire:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {_kind(fields)}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    """First fault in words: what was got, and what is allowed."""
    faults = error.errors(include_url=False)
    unknown = [str(fault["loc"][0]) for fault in faults if fault["type"] == "extra_forbidden"]
    if unknown:
        return f"extra fields not permitted: {', '.join(unknown)}"
    # of a union's faults the deepest names the item at fault, and an empty list is said to be one
    fault = max(faults, key=lambda fault: (len(fault["loc"]), fault["type"] == "too_short"))
    place = "".join(f"[{key}]" for key in fault["loc"] if isinstance(key, int))
    name = f"{fault['loc'][0]}{place}"
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "too_short":
        return f"{name}: got an empty list; allowed: at least one item"
    if name == "input":
        return f"input: got {_shown(fault['input'])}; allowed: a string or a list of strings"
    return f"{name}: got {_shown(fault['input'])}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:60]}.. ({_kind(value)})" if len(text) > 60 else f"{text} ({_kind(value)})"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def item_from_fields(fields: Mapping[str, Any]) -> EmbeddingItem:
    """An item in the native form -> EmbeddingItem.

    Either `text`, `image`, `video` (each one or a list; the model's order is videos, images, texts), or `content`:
    a list of parts `{"type": "text", "text": ..}` in the caller's order. Optional: `instruction`, `dimensions`,
    `normalize`. Raises `InvalidRequest`.
    """
    if not isinstance(fields, Mapping):
        raise InvalidRequest(f"got {_shown(fields)}; allowed: a text, or an object with text, image or content")
    known = {"text", "image", "video", "content", "instruction", "dimensions", "normalize"}
    _refuse_unknown(fields, known)
    if "content" in fields:
        if {"text", "image", "video"} & set(fields):
            raise InvalidRequest("give either `content` or `text`/`image`/`video`, not both")
        parts = tuple(_part(part) for part in _sequence(fields["content"]))
    else:
        videos = [_video(value) for value in _videos(fields.get("video"))]
        images = [Image(value) for value in _sequence(fields.get("image"))]
        texts = [_text(value) for value in _sequence(fields.get("text"))]
        parts = (*videos, *images, *texts)
    if not isinstance(fields.get("normalize", True), bool):
        raise InvalidRequest(f"normalize: got {_shown(fields['normalize'])}; allowed: true or false")
    if not parts:
        raise InvalidRequest("an item needs at least one of text, image or video; got none")
    return EmbeddingItem(parts, fields.get("instruction"), fields.get("dimensions"), fields.get("normalize", True))


def _refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(str(name) for name in set(fields) - known):
        raise InvalidRequest(f"extra fields not permitted: {', '.join(unknown)}")


def _part(part: object) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("text", "image", "video"):
        _refuse_unknown(part, {"type", kind})
        match kind:
            case "text":
                return _text(part.get("text"))
            case "image":
                return Image(part.get("image"))  # type: ignore[arg-type]  # media says what it may be
            case "video":
                return _video(part.get("video"))
    raise InvalidRequest(f"a part of `content` has type text, image or video; got {_shown(part)}")


def _text(value: object) -> Text:
    if not isinstance(value, str):
        raise InvalidRequest(f"text: got {_shown(value)}; allowed: a string")
    return Text(value)


def _sequence(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _videos(value: Any) -> Sequence[Any]:
    """One video is a list of frames, so a list of videos is a list of lists."""
    if value is None:
        return ()
    is_list_of_videos = isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | Video)
    return value if is_list_of_videos else (value,)


def _video(value: Any) -> Video:
    if isinstance(value, Video):
        return value
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"video: got {_shown(value)}; allowed: a list of frames")
    return Video(tuple(value))
