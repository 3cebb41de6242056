"""`POST /embed`: items of any kind in one body -> EmbeddingItems; what became of each -> JSON.

The one route where an item that cannot be embedded costs the caller that item alone: its place in `results` holds an
error, the other places hold vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from embedder.engine.postprocess import Embedding, OutputDtype, check_output_dtype, quantize
from embedder.errors import EmbedderError, InvalidRequest, without_traceback
from embedder.http.request_body import EncodingFormat, Options, check_item_count, validate_body
from embedder.http.response import Usage, Vector, encode_vector, error_fields, to_json, usage_fields
from embedder.inputs.items import EmbeddingItem, describe_value, item_from_fields, without_nulls
from embedder.settings import Settings

Id = str | int | None


class EmbedRequest(Options):
    """Body of `POST /embed`. What stands beside `items` serves the items that bring none of their own."""

    items: list[Any] = Field(min_length=1, description="What to embed: texts, images, videos and mixtures.")


class Failure(BaseModel):
    """Why an item has no vector."""

    code: str
    message: str


class Result(BaseModel):
    """One item's place in the answer: its vector, or its error."""

    index: int
    id: str | int | None = Field(None, description="The caller's own name for the item; absent if there is none.")
    embedding: Vector | None = Field(None, description="Absent where there is an error.")
    error: Failure | None = Field(None, description="Absent where there is a vector.")


class EmbedResponse(BaseModel):
    """Answer of `POST /embed`: as many results as items, in their order."""

    results: list[Result]
    model: str
    usage: Usage
    warnings: list[str] | None = Field(None, description="What was cut, item by item; absent if nothing was.")


@dataclass(frozen=True)
class NativeRequest:
    """`items`: what each entry became, or why it could not. `ids`: the caller's own names for them, one each."""

    items: tuple[EmbeddingItem | InvalidRequest, ...]
    ids: tuple[Id, ...]
    encoding_format: EncodingFormat
    output_dtype: OutputDtype


def parse_embed(body: bytes, settings: Settings) -> NativeRequest:
    """Body of `/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge` for the body, never for an item."""
    wire = validate_body(EmbedRequest, body)
    check_item_count(len(wire.items), settings)
    entries = [_read(entry, wire) for entry in wire.items]
    items, ids = tuple(item for _, item in entries), tuple(name for name, _ in entries)
    return NativeRequest(items, ids, wire.encoding_format, wire.output_dtype)


def embed_response(
    request: NativeRequest, outcomes: Sequence[Embedding | EmbedderError], model: str, limit: int
) -> bytes:
    """The answer, with one outcome for each item. `limit` is the number of tokens that texts were cut to."""
    results = []
    for index, (name, outcome) in enumerate(zip(request.ids, outcomes, strict=True)):
        result: dict[str, Any] = {"index": index} if name is None else {"index": index, "id": name}
        if isinstance(outcome, EmbedderError):
            result["error"] = {"code": outcome.code, "message": outcome.message}
        else:
            result["embedding"] = encode_vector(quantize(outcome.vector, request.output_dtype), request.encoding_format)
        results.append(result)
    embedded = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Embedding)}
    failure = whole_failure(outcomes)
    head = error_fields(failure) if failure else {}
    return to_json({**head, "results": results, "model": model, **usage_fields(embedded, limit)})


def whole_failure(outcomes: Sequence[Embedding | EmbedderError]) -> EmbedderError | None:
    """The first item's error where no item was embedded: it stands for the request, before `results`."""
    first = outcomes[0]
    is_whole = all(isinstance(outcome, EmbedderError) for outcome in outcomes)
    return first if is_whole and isinstance(first, EmbedderError) else None


def _read(entry: Any, wire: EmbedRequest) -> tuple[Id, EmbeddingItem | InvalidRequest]:
    """One entry of `items` -> the caller's name for it, and the item or what is wrong with it."""
    name = None
    try:
        match entry:
            case str():
                entry = {**wire.item_options(), "text": entry}
            case Mapping():
                name = _id(entry.get("id"))
                own = {field: value for field, value in without_nulls(entry).items() if field != "id"}
                entry = {**wire.item_options(), **own}
        item = item_from_fields(entry)
        check_output_dtype(wire.output_dtype, item.normalize)
    except InvalidRequest as error:
        return name, without_traceback(error)
    return name, item


def _id(name: Any) -> Id:
    if name is None or (isinstance(name, str | int) and not isinstance(name, bool)):
        return name
    raise InvalidRequest(f"id: got {describe_value(name)}; allowed: a string or a whole number")
