"""What the request bodies of all routes have in common: options, and messages for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import orjson
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo

from embedder.engine.postprocess import OutputDtype
from embedder.errors import AttributedToItem, InvalidRequest, RequestTooLarge
from embedder.http.accepted_fields import ACCEPTED
from embedder.inputs.items import (
    EmbeddingItem,
    Truncate,
    describe_value,
    json_type,
    unknown_fields_message,
)
from embedder.settings import Settings

EncodingFormat = Literal["float", "base64"]
# Accepts any type: the engine's check names the range of this model, whatever was sent.
AnyDimensions = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})]
SizeOrZero = Annotated[  # `dimensions` of clients that send 0 unless their caller gives a size
    Any,
    BeforeValidator(lambda value: None if type(value) is int and value == 0 else value),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}),
]
_Entry = TypeVar("_Entry")
_Parsed = TypeVar("_Parsed")
_Location = tuple[int | str, ...]
# Reading stops at the first bad entry: explaining a million of them would take seconds.
NonEmptyList = Annotated[list[_Entry], Field(min_length=1, fail_fast=True)]
MAX_SURROGATE_BYTES = 2**20  # of a body with a lone surrogate: it is read a second time, with the GIL held
MAX_EXPLAINED = 100  # unknown fields: with 50,000, pydantic holds the GIL for 0.1 s
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request body as items. `is_list`: whether the response has the shape of a list."""

    items: tuple[EmbeddingItem, ...]
    is_list: bool
    encoding_format: EncodingFormat
    output_dtype: OutputDtype = "float32"


class RequestBody(BaseModel):
    """Base class of request bodies.

    A field that is null counts as not given: many generated clients send nulls. Option words may be in any letter case.
    The fields of `ACCEPTED` are dropped unless the body has a meaning for them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        known = known_names(cls)
        options = _option_words(cls)
        return {
            name: _in_known_case(value, options[name]) if name in options else value
            for name, value in fields.items()
            if value is not None and (name in known or name not in ACCEPTED)
        }


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


def parse_each(entries: Iterable[_Entry], parse: Callable[[_Entry], _Parsed]) -> tuple[_Parsed, ...]:
    """What `parse` makes of each entry. An error of an item gets the entry's index."""
    parsed = []
    with AttributedToItem() as block:
        for block.index, entry in enumerate(entries):
            parsed.append(parse(entry))
    return tuple(parsed)


@cache
def known_names(model: type[BaseModel]) -> frozenset[str]:
    """The names, synonyms included, under which a body takes its fields."""
    return frozenset(alias for name, field in model.model_fields.items() for alias in _aliases(name, field))


def _aliases(name: str, field: FieldInfo) -> Iterator[str]:
    match field.validation_alias:
        case AliasChoices(choices=choices):
            yield from (str(choice) for choice in choices)
        case None:
            yield name
        case alias:
            yield str(alias)


@cache
def _option_words(model: type[BaseModel]) -> dict[str, dict[str, str]]:
    """By field name: the words that the field allows, by their lower case."""
    words: dict[str, dict[str, str]] = {}
    for name, field in model.model_fields.items():
        allowed = {word.lower(): word for word in _literals(field.annotation)}
        if allowed:
            words |= dict.fromkeys(_aliases(name, field), allowed)
    return words


def _literals(annotation: Any) -> Iterator[str]:
    """The words of all `Literal`s in a type."""
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield from (argument,) if isinstance(argument, str) else ()
        else:
            yield from _literals(argument)


def _in_known_case(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [words.get(one.lower(), one) if isinstance(one, str) else one for one in value]
    return words.get(value.lower(), value) if isinstance(value, str) else value


def read_json(body: bytes) -> dict[str, Any]:
    """A body's fields. Raises `InvalidRequest`.

    orjson refuses a body with a lone surrogate. Unless it is large, the standard library then reads it, and the check
    of each text, which knows its item, refuses that item only.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        fields = _read_json_with_surrogates(body, error)
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {json_type(fields)}")
    return fields


def _read_json_with_surrogates(body: bytes, error: orjson.JSONDecodeError) -> Any:
    invalid = InvalidRequest(f"the body is not valid JSON: {error}")
    if "surrogate" not in str(error) or len(body) > MAX_SURROGATE_BYTES:
        raise invalid from error

    def refuse_constant(_: str) -> NoReturn:
        raise invalid

    def read_int(digits: str) -> int | float:
        """As orjson: a number beyond 64 bits is a float."""
        number = int(digits) if len(digits) <= 20 else 2**64
        return number if -(2**63) <= number < 2**64 else read_float(digits)

    def read_float(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise invalid
        return number

    try:
        return json.loads(
            body.decode("utf-8", "surrogatepass"),
            parse_constant=refuse_constant,
            parse_int=read_int,
            parse_float=read_float,
        )
    except (ValueError, RecursionError) as other:
        raise invalid from other


def validate_body(model: type[Body], fields: Mapping[str, Any]) -> Body:
    """The fields of a JSON object or a form -> a body of the given model. Raises `InvalidRequest`."""
    known = known_names(model)
    if len(fields) > len(known) + len(ACCEPTED) + MAX_EXPLAINED:
        raise InvalidRequest(unknown_fields_message([name for name in fields if name not in known], known))
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(_explain(error, model)) from error


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault in words: the value received, and what is allowed."""
    faults = error.errors(include_url=False)
    if unknown := [fault["loc"] for fault in faults if fault["type"] == "extra_forbidden"]:
        missing = [_place(fault["loc"], model)[0] for fault in faults if fault["type"] == "missing"]
        return _explain_unknown(unknown, missing, model)
    if not faults[0]["loc"]:  # pydantic cannot name it
        return "a field's name holds a lone surrogate, which is not Unicode text"
    # the deepest fault of a union names the item, and an empty list is called one
    fault = max(faults, key=lambda fault: (len(fault["loc"]), fault["type"] == "too_short"))
    name, _, value_model = _place(fault["loc"], model)
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "too_short":
        return f"{name}: got an empty list; allowed: at least one item"
    got = f"{name}: got {describe_value(fault['input'])}"
    if fault["type"] in ("model_type", "model_attributes_type") and value_model:
        return f"{got}; allowed: an object with {', '.join(sorted(known_names(value_model)))}"
    if name == "input":
        return f"{got}; allowed: a string or a list of strings"
    return f"{got}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _explain_unknown(unknown: list[_Location], missing: list[str], model: type[BaseModel]) -> str:
    """The unknown fields of one object. A body's only unknown field is taken to be its only missing one, misspelled."""
    *_, holder, _ = _place(unknown[0], model)
    names = [str(location[-1]) for location in unknown if location[:-1] == unknown[0][:-1]]
    message = unknown_fields_message(names, known_names(holder))
    if "did you mean" in message or not missing:
        return message
    return (
        f"{message} (did you mean {missing[0]}?)"
        if len(names) == len(missing) == 1
        else f"{message}; missing: {', '.join(missing)}"
    )


def _place(location: _Location, model: type[BaseModel]) -> tuple[str, type[BaseModel], type[BaseModel] | None]:
    """Where a fault is, such as `input.contents[3]`; the model of the object there, and that of the value, if any.

    Names of a union's branches, which pydantic puts into the location, are left out.
    """
    place, holder = "", model
    value_model: type[BaseModel] | None = model
    for index, key in enumerate(location):
        if isinstance(key, int):
            place += f"[{key}]"
        elif value_model and (key in known_names(value_model) or index == len(location) - 1):
            place += f".{key}" if place else key
            holder, value_model = value_model, _model_of_field(value_model, key)
    return place, holder, value_model


def _model_of_field(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of the objects that a field holds, also in a list or a union; None if it holds no such objects."""
    for key, field in model.model_fields.items():
        if name in _aliases(key, field):
            return next(_models(field.annotation), None)
    return None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
