"""The `local` provider schema: `POST /txt/embed` and `POST /img/embed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from embedder.engine.postprocess import Embedding, check_output_dtype, quantize
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.request_body import (
    EmbeddingRequest,
    NonEmptyList,
    Options,
    check_item_count,
    parse_each,
    validate_body,
)
from embedder.http.response import CUT_TEXTS, Usage, Vector, encode_vector, to_json, usage_fields
from embedder.inputs.items import EXAMPLE_DATA_URI, EXAMPLE_IMAGE, EmbeddingItem, Image, Text
from embedder.settings import Settings

_INPUT_NAMES = AliasChoices("input", "inputs", "content", "contents")


class TextRequest(Options):
    """Body of `POST /txt/embed`."""

    input: str | NonEmptyList[str] = Field(
        validation_alias=_INPUT_NAMES,
        description="One text, or a list of texts; `embedding` has the same shape.",
        examples=["red"],
    )


class ImageRequest(Options):
    """Body of `POST /img/embed`."""

    input: str | NonEmptyList[str] = Field(
        validation_alias=_INPUT_NAMES,
        description="One image as base64, data URI or URL, or a list of images; `embedding` has the same shape.",
        examples=[EXAMPLE_IMAGE],
    )


class EmbeddingResponse(BaseModel):
    """Response of `/txt/embed` and `/img/embed`. `embedding` has the shape of `input`."""

    embedding: Vector | list[Vector] = Field(description="Floats, or base64 of little-endian values; or a list.")
    model: str
    dimensions: int
    usage: Usage
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


def parse_text_request(body: bytes | Mapping[str, Any], settings: Settings) -> EmbeddingRequest:
    """Body of `/txt/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(TextRequest, body), Text, settings)


def parse_image_request(body: bytes | Mapping[str, Any], settings: Settings) -> EmbeddingRequest:
    """Body of `/img/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(ImageRequest, body), Image, settings)


def _request(body: TextRequest | ImageRequest, part: type[Text] | type[Image], settings: Settings) -> EmbeddingRequest:
    inputs = body.input if isinstance(body.input, list) else [body.input]
    check_item_count(len(inputs), settings)
    check_output_dtype(body.output_dtype, body.normalize)
    items = parse_each(inputs, lambda value: EmbeddingItem((part(value),), **body.item_options()))
    return EmbeddingRequest(items, isinstance(body.input, list), body.encoding_format, body.output_dtype)


def embedding_response(request: EmbeddingRequest, embeddings: Sequence[Embedding], model: ServedModel) -> bytes:
    """Embeddings -> response body."""
    vectors = [encode_vector(quantize(one.vector, request.output_dtype), request.encoding_format) for one in embeddings]
    return to_json(
        {
            "embedding": vectors if request.is_list else vectors[0],
            "model": model.name,
            "dimensions": len(embeddings[0].vector),
            **usage_fields(dict(enumerate(embeddings)), model.max_input_tokens),
        }
    )


TEXTS = Dialect(
    "/txt/embed",
    "Embed texts",
    TextRequest,
    EmbeddingResponse,
    parse_text_request,
    embedding_response,
    examples={
        "one text": {"input": "red"},
        "several, smaller": {"input": ["red", "green"], "dimensions": 64, "encoding_format": "base64"},
    },
)
IMAGES = Dialect(
    "/img/embed",
    "Embed images",
    ImageRequest,
    EmbeddingResponse,
    parse_image_request,
    embedding_response,
    examples={
        "one image": {"input": EXAMPLE_IMAGE},
        "several": {"input": [EXAMPLE_IMAGE, EXAMPLE_DATA_URI]},
    },
)
