"""`POST /embed`: items of any kind. `results` has a vector or an error for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, Field

from embedder.engine.postprocess import Embedding, OutputDtype, check_output_dtype, quantize
from embedder.errors import EmbedderError, InvalidRequest, without_traceback
from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel
from embedder.http.dialects.messages import item_from_string
from embedder.http.request_body import EncodingFormat, Options, check_item_count, validate_body
from embedder.http.response import CUT_TEXTS, Usage, Vector, encode_vector, to_json, usage_fields
from embedder.inputs.items import (
    EXAMPLE_IMAGE,
    EmbeddingItem,
    check_text,
    describe_value,
    item_from_fields,
    without_nulls,
)
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings

Id = str | int | None


class EmbedRequest(Options):
    """Body of `POST /embed`. Its options apply to items that do not set them themselves."""

    items: list[Any] = Field(min_length=1, description="Texts, images, videos and mixtures of them.")


class Failure(BaseModel):
    """Why an item has no vector."""

    code: str
    message: str


class Result(BaseModel):
    """One item's vector, or its error."""

    index: int
    id: Id = Field(None, description="The caller's name for the item; absent if there is none.")
    embedding: Vector | None = Field(None, description="Absent if the item failed.")
    error: Failure | None = Field(None, description="Absent if the item was embedded.")


class EmbedResponse(BaseModel):
    """Response of `POST /embed`: one result for each item, in order."""

    results: list[Result]
    model: str
    usage: Usage
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


class Encoding(Protocol):
    """How the vectors of a response are written."""

    @property
    def encoding_format(self) -> EncodingFormat: ...
    @property
    def output_dtype(self) -> OutputDtype: ...


@dataclass(frozen=True)
class EmbedItemsRequest:
    """`items`: each entry as an item, or the error that it caused. `ids`: the caller's names for them."""

    items: tuple[EmbeddingItem | InvalidRequest, ...]
    ids: tuple[Id, ...]
    encoding_format: EncodingFormat
    output_dtype: OutputDtype


def parse_embed(body: Mapping[str, Any], settings: Settings) -> EmbedItemsRequest:
    """Body of `/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge` for the body, never for an item."""
    request = validate_body(EmbedRequest, body)
    check_item_count(len(request.items), settings)
    entries = [_parse_entry(entry, request) for entry in request.items]
    items, ids = tuple(item for _, item in entries), tuple(name for name, _ in entries)
    return EmbedItemsRequest(items, ids, request.encoding_format, request.output_dtype)


def embed_response(request: EmbedItemsRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body. If every item failed, raises the first error, with the whole body as its details."""
    names = [{} if name is None else {"id": name} for name in request.ids]
    return results_response(names, request, outcomes, model)


def results_response(
    names: Sequence[Mapping[str, Any]], request: Encoding, outcomes: Outcomes, model: ServedModel
) -> bytes:
    """As `embed_response`. `names`: the fields of each result that say what it is of."""
    results = []
    for index, (name, outcome) in enumerate(zip(names, outcomes, strict=True)):
        result: dict[str, Any] = {"index": index, **name}
        if isinstance(outcome, EmbedderError):
            result["error"] = {"code": outcome.code, "message": outcome.message}
        else:
            result["embedding"] = encode_vector(quantize(outcome.vector, request.output_dtype), request.encoding_format)
        results.append(result)
    embedded = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Embedding)}
    body = {"results": results, "model": model.name, **usage_fields(embedded, model.max_input_tokens)}
    first = outcomes[0]
    if not embedded and isinstance(first, EmbedderError):
        first.details = body
        raise first
    return to_json(body)


def _parse_entry(entry: Any, request: EmbedRequest) -> tuple[Id, EmbeddingItem | InvalidRequest]:
    """One entry of `items` -> the caller's name for it, and the item or what is wrong with it."""
    name = None
    try:
        match entry:
            case str():
                entry = {**request.item_options(), **item_from_string(entry)}
            case Mapping():
                name = _id(entry.get("id"))
                own = {field: value for field, value in without_nulls(entry).items() if field != "id"}
                entry = {**request.item_options(), **own}
        item = item_from_fields(entry)
        check_output_dtype(request.output_dtype, item.normalize)
    except InvalidRequest as error:
        return name, without_traceback(error)
    return name, item


def _id(name: Any) -> Id:
    if isinstance(name, str):
        check_text("id", name)
        return name
    if name is None or (isinstance(name, int) and not isinstance(name, bool)):
        return name
    raise InvalidRequest(f"id: got {describe_value(name)}; allowed: a string or a whole number")


EMBED = Dialect(
    "/embed",
    "Embed items of any kind: a vector or an error for each",
    EmbedRequest,
    EmbedResponse,
    parse_embed,
    embed_response,
    examples={
        "text, image, mixture": {
            "items": [
                "red",
                {"text": "a red square", "instruction": QUERY_INSTRUCTION, "id": "query"},
                {"image": EXAMPLE_IMAGE, "dimensions": 64},
                {"content": [{"type": "text", "text": "a swatch: "}, {"type": "image", "image": EXAMPLE_IMAGE}]},
            ]
        },
        "one bad item": {"items": ["red", {"image": "not a picture"}]},
    },
    fails_per_item=True,
)
