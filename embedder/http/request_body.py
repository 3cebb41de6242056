"""What the request bodies of all routes have in common: options, and messages for what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

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

from embedder.engine.postprocess import OutputDtype
from embedder.errors import InvalidRequest, RequestTooLarge
from embedder.inputs.items import (
    EmbeddingItem,
    Truncate,
    describe_value,
    json_type,
    unknown_fields_message,
    without_nulls,
)
from embedder.settings import Settings

EncodingFormat = Literal["float", "base64"]
# Accepts any type: the engine's check names the range of this model, whatever was sent.
AnyDimensions = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})]
_Entry = TypeVar("_Entry")
# Reading stops at the first bad entry: explaining a million of them would take seconds.
NonEmptyList = Annotated[list[_Entry], Field(min_length=1, fail_fast=True)]
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request body as items. `is_list`: whether the response has the shape of a list."""

    items: tuple[EmbeddingItem, ...]
    is_list: bool
    encoding_format: EncodingFormat
    output_dtype: OutputDtype = "float32"


class RequestBody(BaseModel):
    """Base class of request bodies. A field that is null counts as not given: many generated clients send nulls."""

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
        description="Matryoshka size: the first values of the vector, normalized again.",
    )
    normalize: StrictBool = Field(True, description="Divide the vector by its L2 norm.")
    encoding_format: EncodingFormat = Field(
        "float", description="`base64`: the vector's bytes, little-endian, in base64."
    )
    output_dtype: OutputDtype = Field(
        "float32", description="Type of the values; `binary` and `ubinary` pack eight values into a byte."
    )
    truncate: Truncate = Field("end", description="Which end of text over the limit is cut; `none`: an error.")

    def item_options(self) -> dict[str, Any]:
        """The options of an item, as `item_from_fields` takes them."""
        return {name: getattr(self, name) for name in ("instruction", "dimensions", "normalize", "truncate")}


def check_item_count(num_items: int, settings: Settings) -> None:
    """Raises `RequestTooLarge` for more items than `EMBEDDER_MAX_ITEMS_PER_REQUEST`."""
    if num_items > settings.max_items_per_request:
        raise RequestTooLarge(
            f"got {num_items} items; allowed: 1 to {settings.max_items_per_request} (EMBEDDER_MAX_ITEMS_PER_REQUEST)"
        )


def validate_body(model: type[Body], body: bytes) -> Body:
    """JSON -> a body of the given model. Raises `InvalidRequest`."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {json_type(fields)}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    """The first fault in words: the value received, and what is allowed."""
    faults = error.errors(include_url=False)
    unknown = [str(fault["loc"][0]) for fault in faults if fault["type"] == "extra_forbidden"]
    if unknown:
        return unknown_fields_message(unknown)
    # the deepest fault of a union names the item, and an empty list is called one
    fault = max(faults, key=lambda fault: (len(fault["loc"]), fault["type"] == "too_short"))
    place = "".join(f"[{key}]" for key in fault["loc"] if isinstance(key, int))
    name = f"{fault['loc'][0]}{place}"
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "too_short":
        return f"{name}: got an empty list; allowed: at least one item"
    if name == "input":
        return f"input: got {describe_value(fault['input'])}; allowed: a string or a list of strings"
    return f"{name}: got {describe_value(fault['input'])}; {fault['msg'][0].lower()}{fault['msg'][1:]}"
