"""Responses of Cohere's `/v1/embed` and `/v2/embed`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from embedder.engine.postprocess import Embedding, quantize, to_base64
from embedder.http.dialects.dialect import ServedModel
from embedder.http.response import CUT_TEXTS, to_json, usage_fields
from embedder.inputs.items import EmbeddingItem, Image

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class BilledUnits(BaseModel):
    """What was embedded. `input_tokens`: of texts, with instruction and template; 0 if there are only images."""

    input_tokens: int
    image_tokens: int
    images: int


class Tokens(BaseModel):
    """All tokens embedded."""

    input_tokens: int


class Meta(BaseModel):
    """About the response."""

    api_version: dict[str, str]
    billed_units: BilledUnits
    tokens: Tokens
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


class CohereEmbedResponse(BaseModel):
    """Response of `POST /v2/embed`."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: dict[EmbeddingType, list[list[float] | str]] = Field(description="One vector per item, by type.")
    texts: list[str] | None = Field(None, description="The texts of the request; absent if it has none.")
    meta: Meta


class CohereV1Response(BaseModel):
    """Response of `POST /v1/embed`."""

    id: str
    response_type: Literal["embeddings_by_type", "embeddings_floats"]
    embeddings: dict[EmbeddingType, list[list[float] | str]] | list[list[float]]
    texts: list[str] = Field(description="The texts of the request.")
    meta: Meta


@dataclass(frozen=True)
class CohereRequest:
    """A body as items, and the types of vectors that it asks for."""

    items: tuple[EmbeddingItem, ...]
    types: tuple[EmbeddingType, ...]
    texts: tuple[str, ...] | None
    is_images: bool
    version: str = "2"


def cohere_response(request: CohereRequest, embeddings: Sequence[Embedding], model: ServedModel) -> bytes:
    """Embeddings -> response body."""
    usage = usage_fields(dict(enumerate(embeddings)), model.max_input_tokens)
    num_tokens = usage.pop("usage")["prompt_tokens"]
    num_image_tokens = num_tokens if request.is_images else sum(one.num_visual_tokens for one in embeddings)
    num_images = sum(isinstance(part, Image) for item in request.items for part in item.parts)
    meta = {
        "api_version": {"version": request.version},
        "billed_units": {
            "input_tokens": num_tokens - num_image_tokens,
            "image_tokens": num_image_tokens,
            "images": num_images,
        },
        "tokens": {"input_tokens": num_tokens},
        **usage,
    }
    by_type = {kind: [_typed(one.vector, kind) for one in embeddings] for kind in request.types}
    texts = {} if request.texts is None and request.version == "2" else {"texts": request.texts or ()}
    return to_json(
        {
            "id": str(uuid.uuid4()),
            "response_type": "embeddings_by_type" if request.types else "embeddings_floats",
            "embeddings": by_type or [one.vector for one in embeddings],
            **texts,
            "meta": meta,
        }
    )


def _typed(vector: NDArray[np.float32], kind: EmbeddingType) -> Any:
    match kind:
        case "float":
            return vector
        case "base64":
            return to_base64(vector)
        case _:
            return quantize(vector, kind)
