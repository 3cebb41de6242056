"""infinity's `POST /embeddings` and `GET /models`.

The body is that of `/v1/embeddings`, in which 0 dimensions mean all of them. infinity's own client accepts a model only
if it is owned by `infinity` and has `stats`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from pydantic import AliasChoices, Field

from embedder.http.dialects.dialect import ServedModel
from embedder.http.dialects.openai import EMBEDDINGS, EmbeddingsRequest, parse_embeddings
from embedder.http.request_body import SizeOrZero
from embedder.http.response import to_json


class InfinityRequest(EmbeddingsRequest):
    """Body of `POST /embeddings`."""

    dimensions: SizeOrZero = Field(
        None,
        validation_alias=AliasChoices("dimensions", "dim", "dimension", "output_dimension"),
        description="Matryoshka size: the first values of the vector, normalized again; 0: all values.",
    )


EMBED = dataclasses.replace(
    EMBEDDINGS,
    path="/embeddings",
    summary="Embed, in the format of infinity's clients",
    request=InfinityRequest,
    parse=partial(parse_embeddings, body_model=InfinityRequest),
)


def models_response(models: Sequence[ServedModel], started_s: float) -> bytes:
    """Response body of `GET /models`."""
    card = {"object": "model", "owned_by": "infinity", "created": int(started_s), "backend": "torch", "stats": {}}
    cards = [{"id": model.name, **card, "max_model_len": model.max_input_tokens} for model in models]
    return to_json({"object": "list", "data": cards})
