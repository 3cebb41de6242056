"""What a route that embeds has to define; each dialect file defines one or two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from embedder.engine.aio import Outcome
from embedder.errors import EmbedderError
from embedder.inputs.items import EmbeddingItem
from embedder.settings import Settings


@dataclass(frozen=True)
class ServedModel:
    """What responses say about the model. `max_input_tokens`: the length that texts are cut to."""

    name: str
    max_input_tokens: int


class ParsedRequest(Protocol):
    """A request body as items; an error in the place of an item is that item's outcome."""

    @property
    def items(self) -> Sequence[EmbeddingItem | EmbedderError]: ...


Parsed = TypeVar("Parsed", bound=ParsedRequest)
Outcomes = Sequence[Outcome]


@dataclass(frozen=True)
class Dialect(Generic[Parsed]):
    """A route that embeds, in the format of one family of clients.

    `parse` turns a body into items, and raises `InvalidRequest`. `respond` turns their outcomes, in order, into a
    response body. Unless `fails_per_item`, the first item that fails fails the request, and `respond` gets embeddings
    only. `request`, `response` and `examples` (bodies by name, each answered with 200) are for the OpenAPI document.
    """

    path: str
    summary: str
    request: type[BaseModel]
    response: type[BaseModel]
    parse: Callable[[bytes, Settings], Parsed]
    respond: Callable[[Parsed, Sequence[Any], ServedModel], bytes]
    examples: Mapping[str, Any]
    fails_per_item: bool = False
