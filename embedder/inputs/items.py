"""JSON of a request -> EmbeddingRequest and its EmbeddingItems, validated.

The wire models (pydantic) stay in this file and in `response`; inside, items are frozen dataclasses. An item is any
mixture of texts, images and videos in the caller's order. What is model-specific (the range of `dimensions`) is
checked by the engine at admission, before any work.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import orjson
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from embedder.errors import InvalidRequest, RequestTooLarge
from embedder.settings import Settings

if TYPE_CHECKING:
    import PIL.Image

    Media = bytes | str | PIL.Image.Image

EncodingFormat = Literal["float", "base64"]
OutputDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
Truncate = Literal["end", "start", "none"]
# Of any type on the wire: the engine's check names the range of this model, whatever was sent.
AnyDimensions = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})]
_Entry = TypeVar("_Entry")
# A list of the wire, of one at least; the first fault ends its reading, for a million more would cost seconds.
NonEmptyList = Annotated[list[_Entry], Field(min_length=1, fail_fast=True)]
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


@dataclass(frozen=True)
class EmbeddingRequest:
    """One HTTP body. `is_list` says whether the answer has the shape of a list."""

    items: tuple[EmbeddingItem, ...]
    is_list: bool
    encoding_format: EncodingFormat
    output_dtype: OutputDtype = "float32"


class RequestBody(BaseModel):
    """Base of the bodies of all routes. A field that is null counts as not given: many generated clients send those."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return without_nulls(fields) if isinstance(fields, Mapping) else fields


class Options(RequestBody):
    """Options that most routes take, in addition to the items."""

    instruction: str | None = Field(None, description="The task, as the system message; default: the service's.")
    dimensions: AnyDimensions = Field(
        None,
        validation_alias=AliasChoices("dimensions", "dim", "dimension", "output_dimension"),
        description="Matryoshka size: the first values of the vector, brought to unit length again.",
    )
    normalize: StrictBool = Field(True, description="Divide the vector by its length.")
    encoding_format: EncodingFormat = Field(
        "float", description="`base64` answers the vector's bytes in base64, little-endian."
    )
    output_dtype: OutputDtype = Field(
        "float32", description="Type of the vector's values; the two binaries hold eight values in a byte."
    )
    truncate: Truncate = Field("end", description="Of text over the limit: which end is cut; `none`: an error.")

    def item_options(self) -> dict[str, Any]:
        """What each item takes of these, in the native form; what an item says itself goes before."""
        return {name: getattr(self, name) for name in ("instruction", "dimensions", "normalize", "truncate")}


_INPUT_NAMES = AliasChoices("input", "inputs", "content", "contents")


class TextRequest(Options):
    """Body of `POST /txt/embed`."""

    input: str | NonEmptyList[str] = Field(
        validation_alias=_INPUT_NAMES,
        description="One text, or several; `embedding` has the same shape.",
        examples=["red"],
    )


class ImageRequest(Options):
    """Body of `POST /img/embed`."""

    input: str | NonEmptyList[str] = Field(
        validation_alias=_INPUT_NAMES,
        description="One image in base64 (bare or as a data URI) or its URL, or several; `embedding` has their shape.",
        examples=[EXAMPLE_IMAGE],
    )


def parse_text_request(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/txt/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(TextRequest, body), Text, settings)


def parse_image_request(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/img/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(ImageRequest, body), Image, settings)


def _request(wire: TextRequest | ImageRequest, part: type[Text] | type[Image], settings: Settings) -> EmbeddingRequest:
    inputs = wire.input if isinstance(wire.input, list) else [wire.input]
    check_item_count(len(inputs), settings)
    check_output_dtype(wire.output_dtype, wire.normalize)
    items = tuple(EmbeddingItem((part(value),), **wire.item_options()) for value in inputs)
    return EmbeddingRequest(items, isinstance(wire.input, list), wire.encoding_format, wire.output_dtype)


def check_item_count(num_items: int, settings: Settings) -> None:
    """Raises `RequestTooLarge` above the operator's limit."""
    if num_items > settings.max_items_per_request:
        raise RequestTooLarge(f"got {num_items} items; allowed: 1 to {settings.max_items_per_request}")


def check_output_dtype(output_dtype: OutputDtype, normalize: bool) -> None:
    """Raises `InvalidRequest` for int8 and uint8 of a vector that is not normalized: their scale is a unit vector's."""
    if output_dtype in ("int8", "uint8") and not normalize:
        raise InvalidRequest(f"output_dtype: got {output_dtype} with normalize false; allowed: with normalize true")


def validate_body(model: type[Wire], body: bytes) -> Wire:
    """JSON -> a wire model of any route. Raises `InvalidRequest` that says what was got and what is allowed."""
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
        return _refusal(unknown)
    # of a union's faults the deepest names the item at fault, and an empty list is said to be one
    fault = max(faults, key=lambda fault: (len(fault["loc"]), fault["type"] == "too_short"))
    place = "".join(f"[{key}]" for key in fault["loc"] if isinstance(key, int))
    name = f"{fault['loc'][0]}{place}"
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "too_short":
        return f"{name}: got an empty list; allowed: at least one item"
    if name == "input":
        return f"input: got {shown(fault['input'])}; allowed: a string or a list of strings"
    return f"{name}: got {shown(fault['input'])}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def shown(value: object) -> str:
    """A caller's value for a message: its beginning, and what JSON calls its type."""
    text = repr(value[:61]) if isinstance(value, str) else _SHORT.repr(value)
    return f"{text[:60]}.. ({_kind(value)})" if len(text) > 60 else f"{text} ({_kind(value)})"


_SHORT = reprlib.Repr()  # looks neither deeper nor further than it shows
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxstring = _SHORT.maxother = 64


def _kind(value: object) -> str:
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
        raise InvalidRequest(f"got {shown(fields)}; allowed: a text, or an object with text, image or content")
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
        raise InvalidRequest(f"normalize: got {shown(fields['normalize'])}; allowed: true or false")
    if not parts:
        raise InvalidRequest("an item needs at least one of text, image or video; got none")
    truncate = fields.get("truncate", "end")
    if truncate not in get_args(Truncate):
        raise InvalidRequest(f"truncate: got {shown(truncate)}; allowed: {', '.join(get_args(Truncate))}")
    return EmbeddingItem(
        parts, fields.get("instruction"), fields.get("dimensions"), fields.get("normalize", True), truncate
    )


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are given: null means the same as leaving a field out."""
    return {name: value for name, value in fields.items() if value is not None}


def refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    """Raises `InvalidRequest` that names the fields which are not among the known."""
    if unknown := sorted(str(name) for name in set(fields) - known):
        raise InvalidRequest(_refusal(unknown))


def _refusal(unknown: Sequence[str]) -> str:
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
    raise InvalidRequest(f"a part of `content` has type text, image or video; got {shown(part)}")


def _text(value: object) -> Text:
    if not isinstance(value, str):
        raise InvalidRequest(f"text: got {shown(value)}; allowed: a string")
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
        raise InvalidRequest(f"video: got {shown(value)}; allowed: base64, a data URI, a URL, or a list of frames")
    is_number = isinstance(fps, int | float) and not isinstance(fps, bool)
    if fps is not None and not (is_number and 0.01 <= fps <= 1000):
        raise InvalidRequest(f"fps: got {shown(fps)}; allowed: a number from 0.01 to 1000")
    return Video(tuple(value) if isinstance(value, list | tuple) else value, fps)
