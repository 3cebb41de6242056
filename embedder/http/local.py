"""The `local` provider schema, `POST /txt/embed` and `POST /img/embed`: body -> request, vectors -> response."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import AliasChoices, BaseModel, Field

from embedder.engine.postprocess import Embedding, check_output_dtype, quantize
from embedder.http.request_body import EmbeddingRequest, NonEmptyList, Options, check_item_count, validate_body
from embedder.http.response import Usage, Vector, encode_vector, to_json, usage_fields
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, Text
from embedder.settings import Settings

_INPUT_NAMES = AliasChoices("input", "inputs", "content", "contents")


class TextRequest(Options):
    """Body of `POST /txt/embed`."""

    input: str | NonEmptyList[str] = Field(
        validation_alias=_INPUT_NAMES,
        description="One text, or several; `embedding` has the same shape.",
        examples=["red"],
    )


class ImageRequest(Options):
    """Body of `POST /img/embed`."""

    input: str | NonEmptyList[str] = Field(
        validation_alias=_INPUT_NAMES,
        description="One image in base64 (bare or as a data URI) or its URL, or several; `embedding` has their shape.",
        examples=[EXAMPLE_IMAGE],
    )


class EmbeddingResponse(BaseModel):
    """Answer of `/txt/embed` and `/img/embed`. `embedding` has the shape of `input`."""

    embedding: Vector | list[Vector] = Field(description="Floats, or base64 of little-endian float32; a list of them.")
    model: str
    dimensions: int
    usage: Usage
    warnings: list[str] | None = Field(None, description="What was cut, item by item; absent if nothing was.")


def parse_text_request(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/txt/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(TextRequest, body), Text, settings)


def parse_image_request(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/img/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(ImageRequest, body), Image, settings)


def _request(wire: TextRequest | ImageRequest, part: type[Text] | type[Image], settings: Settings) -> EmbeddingRequest:
    inputs = wire.input if isinstance(wire.input, list) else [wire.input]
    check_item_count(len(inputs), settings)
    check_output_dtype(wire.output_dtype, wire.normalize)
    items = tuple(EmbeddingItem((part(value),), **wire.item_options()) for value in inputs)
    return EmbeddingRequest(items, isinstance(wire.input, list), wire.encoding_format, wire.output_dtype)


def embedding_response(request: EmbeddingRequest, embeddings: Sequence[Embedding], model: str, limit: int) -> bytes:
    """The answer to a request. `limit` is the number of tokens that texts were cut to."""
    vectors = [encode_vector(quantize(one.vector, request.output_dtype), request.encoding_format) for one in embeddings]
    return to_json(
        {
            "embedding": vectors if request.is_list else vectors[0],
            "model": model,
            "dimensions": len(embeddings[0].vector),
            **usage_fields(dict(enumerate(embeddings)), limit),
        }
    )
