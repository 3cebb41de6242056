"""Cohere's routes: `POST /v2/embed`, and `POST /v1/embed`, which langchain-cohere uses."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictInt

from embedder.engine.postprocess import Embedding, quantize, to_base64
from embedder.errors import InvalidRequest
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.messages import InputType, instruction_for, parts_from_content, text_limit
from embedder.http.request_body import (
    AnyDimensions,
    NonEmptyList,
    RequestBody,
    check_item_count,
    parse_each,
    validate_body,
)
from embedder.http.response import CUT_TEXTS, to_json, usage_fields
from embedder.inputs.items import (
    EXAMPLE_DATA_URI,
    EmbeddingItem,
    Image,
    describe_value,
    item_from_fields,
    refuse_unknown,
)
from embedder.settings import Settings

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class CohereEmbedRequest(RequestBody):
    """Body of `POST /v2/embed`: one of `texts`, `images` and `inputs`."""

    texts: NonEmptyList[str] | None = None
    images: NonEmptyList[str] | None = Field(None, description="Base64, data URIs or URLs.")
    inputs: NonEmptyList[Any] | None = Field(None, description="Mixtures of texts and images, in your order.")
    input_type: InputType | None = Field(None, description="Chooses the instruction: a query's, or the default.")
    embedding_types: NonEmptyList[EmbeddingType] = Field(["float"])
    output_dimension: AnyDimensions = Field(None, description="Matryoshka size.")
    truncate: Literal["NONE", "START", "END"] = Field("END", description="Text over the limit is refused or cut.")
    max_tokens: StrictInt | None = Field(None, description="Tokens of text that are kept.")


class CohereV1Request(CohereEmbedRequest):
    """Body of `POST /v1/embed`. Without `embedding_types` the response has plain lists of floats."""

    embedding_types: NonEmptyList[EmbeddingType] | None = Field(None)  # type: ignore[assignment]


class BilledUnits(BaseModel):
    """What was embedded. `input_tokens`: of texts, with instruction and template; of images alone it is 0."""

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


def parse_cohere(body: bytes | Mapping[str, Any], settings: Settings) -> CohereRequest:
    """Body of `/v2/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(CohereEmbedRequest, body), settings, "2")


def parse_cohere_v1(body: bytes | Mapping[str, Any], settings: Settings) -> CohereRequest:
    """Body of `/v1/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(CohereV1Request, body), settings, "1")


def _request(request: CohereEmbedRequest, settings: Settings, version: str) -> CohereRequest:
    given = [name for name in ("texts", "images", "inputs") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(f"give one of `texts`, `images` and `inputs`; got {' and '.join(given) or 'none'}")
    entries: list[Any] = getattr(request, given[0])
    check_item_count(len(entries), settings)
    options = {
        "instruction": instruction_for(request.input_type),
        "dimensions": request.output_dimension,
        "truncate": request.truncate.lower(),
        "max_text_tokens": text_limit("max_tokens", request.max_tokens, settings),
    }

    def to_item(entry: Any) -> EmbeddingItem:
        content = _content(entry) if given == ["inputs"] else {given[0].removesuffix("s"): entry}
        return item_from_fields({**options, **content})

    items = parse_each(entries, to_item)
    types = tuple(dict.fromkeys(request.embedding_types or ()))
    texts = tuple(request.texts) if request.texts is not None else None
    return CohereRequest(items, types, texts, given == ["images"], version)


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


def _content(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise InvalidRequest(f"got {describe_value(entry)}; allowed: an object with content")
    refuse_unknown(entry, {"content"})
    return {"content": parts_from_content(entry.get("content"))}


def _typed(vector: NDArray[np.float32], kind: EmbeddingType) -> Any:
    match kind:
        case "float":
            return vector
        case "base64":
            return to_base64(vector)
        case _:
            return quantize(vector, kind)


EMBED = Dialect(
    "/v2/embed",
    "Embed, in the format of Cohere's clients",
    CohereEmbedRequest,
    CohereEmbedResponse,
    parse_cohere,
    cohere_response,
    examples={
        "texts": {"model": "any", "texts": ["red"], "input_type": "search_query"},
        "types": {
            "images": [EXAMPLE_DATA_URI],
            "input_type": "image",
            "embedding_types": ["int8", "ubinary", "base64"],
        },
        "mixture": {
            "inputs": [
                {
                    "content": [
                        {"type": "text", "text": "a swatch"},
                        {"type": "image_url", "image_url": {"url": EXAMPLE_DATA_URI}},
                    ]
                }
            ]
        },
    },
)
EMBED_V1 = Dialect(
    "/v1/embed",
    "Embed, in the format of the first version of Cohere's API",
    CohereV1Request,
    CohereV1Response,
    parse_cohere_v1,
    cohere_response,
    examples={
        "floats": {"texts": ["red"], "input_type": "search_query"},
        "types": {"texts": ["red"], "input_type": "search_document", "embedding_types": ["float", "int8"]},
    },
)
