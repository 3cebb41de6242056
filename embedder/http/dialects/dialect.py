"""What a route has to define; each dialect file defines one or two."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel
from starlette.responses import Response

from embedder.engine.aio import Outcome
from embedder.errors import EmbedderError
from embedder.http.error_forms import ErrorForm
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.preprocess import Preprocessor
from embedder.settings import Settings


@dataclass(frozen=True)
class ServedModel:
    """What responses say about the model. `max_input_tokens`: the length that texts are cut to.

    `info`: what `/info` reports. `clock_offset_s`: added to `time.monotonic()`, gives seconds since 1970.
    """

    name: str
    max_input_tokens: int
    info: Mapping[str, Any] = field(default_factory=dict)
    clock_offset_s: float = 0.0

    def now(self) -> int:
        """Seconds since 1970."""
        return int(time.monotonic() + self.clock_offset_s)


class ParsedRequest(Protocol):
    """A request body as items; an error in the place of an item is that item's outcome."""

    @property
    def items(self) -> Sequence[EmbeddingItem | EmbedderError]: ...


Parsed = TypeVar("Parsed", bound=ParsedRequest)
Outcomes = Sequence[Outcome]
Role = Literal["embedder", "reranker"]


@dataclass(frozen=True)
class Upload(Generic[Parsed]):
    """How a route takes files. `name`: the form's field with the files; `request` describes the other fields.

    `parse` gets all values of each field, in order. `options` makes fields of a JSON body of the URL's query, also
    `priority`.
    """

    name: str
    request: type[BaseModel]
    parse: Callable[[Mapping[str, list[bytes | str]], Settings], Parsed]
    options: Callable[[Mapping[str, str]], dict[str, Any]]


@dataclass(frozen=True)
class Dialect(Generic[Parsed]):
    """A route that embeds or, with the role `reranker`, scores documents, in the format of one family of clients.

    `parse` turns a body into items, and raises `InvalidRequest`. `respond` turns their outcomes, in order, into a
    response body, or a whole response. Unless `fails_per_item`, the first item that fails fails the request, and
    `respond` gets embeddings only. `request`, `response` and `examples` (bodies by name, each answered with 200) are
    for the OpenAPI document. Of dialects with the same path, the one whose field `given` the body has is used (`a.b`:
    field b of the object a); then `errors` is the form of its errors, which otherwise the path decides. With `upload`
    it also takes files.
    """

    path: str
    summary: str
    request: type[BaseModel]
    response: type[BaseModel]
    parse: Callable[[Mapping[str, Any], Settings], Parsed]
    respond: Callable[[Parsed, Sequence[Any], ServedModel], bytes | Response]
    examples: Mapping[str, Any]
    fails_per_item: bool = False
    given: str = ""
    errors: ErrorForm | None = None
    upload: Upload[Parsed] | None = None
    role: Role = "embedder"


@dataclass(frozen=True)
class TokenRoute:
    """A route that needs only the tokenizer. `handle` returns the fields of the response."""

    path: str
    summary: str
    request: type[BaseModel]
    response: type[BaseModel]
    handle: Callable[[Mapping[str, Any], Preprocessor, Settings], Any]
    examples: Mapping[str, Any]


def by_path(dialects: Sequence[Dialect[Any]]) -> dict[str, list[Dialect[Any]]]:
    """The dialects of each path, in order."""
    grouped: dict[str, list[Dialect[Any]]] = {}
    for dialect in dialects:
        grouped.setdefault(dialect.path, []).append(dialect)
    return grouped


def choose_dialect(dialects: Sequence[Dialect[Any]], fields: Mapping[str, Any]) -> Dialect[Any]:
    """Of dialects with the same path, the first whose field `given` the body has; else the last."""
    return next((one for one in dialects if _has(fields, one.given)), dialects[-1])


def _has(fields: Mapping[str, Any], given: str) -> bool:
    value: Any = fields
    for name in given.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value is not None
