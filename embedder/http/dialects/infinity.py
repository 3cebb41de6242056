"""infinity's `POST /embeddings`: the body of `/v1/embeddings`, in which 0 dimensions mean all of them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Any

from pydantic import AliasChoices, Field, WithJsonSchema, field_validator

from embedder.http.dialects.openai import EMBEDDINGS, EmbeddingsRequest, parse_embeddings

_OrZero = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]})]


class InfinityRequest(EmbeddingsRequest):
    """Body of `POST /embeddings`."""

    dimensions: _OrZero = Field(
        None,
        validation_alias=AliasChoices("dimensions", "dim", "dimension", "output_dimension"),
        description="Matryoshka size: the first values of the vector, normalized again; 0: all values.",
    )

    @field_validator("dimensions")
    @classmethod
    def _zero_is_not_given(cls, value: Any) -> Any:
        """The client of infinity sends 0 unless the caller gives a size."""
        return None if type(value) is int and value == 0 else value


EMBED = dataclasses.replace(
    EMBEDDINGS,
    path="/embeddings",
    summary="Embed, in the format of infinity's clients",
    request=InfinityRequest,
    parse=partial(parse_embeddings, body_model=InfinityRequest),
)
