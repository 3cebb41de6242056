"""The `local` provider schema: `POST /txt/embed` and `POST /img/embed`, which also takes files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, ValidationInfo, field_validator

from embedder.engine.postprocess import Embedding, check_output_dtype, quantize
from embedder.http.dialects.dialect import Dialect, ServedModel, Upload
from embedder.http.priority import PRIORITY
from embedder.http.request_body import (
    EmbeddingRequest,
    NonEmptyList,
    Options,
    check_item_count,
    known_names,
    parse_each,
    validate_body,
)
from embedder.http.response import CUT_TEXTS, Usage, Vector, encode_vector, to_json, usage_fields
from embedder.inputs.items import EXAMPLE_DATA_URI, EXAMPLE_IMAGE, EmbeddingItem, Image, Text
from embedder.settings import Settings

_SIZES = ("dimensions", "dim", "dimension", "output_dimension")
_NUMBERS = (*_SIZES, PRIORITY)
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


class ImageForm(Options):
    """Fields of a form that is sent to `POST /img/embed`. Options are texts."""

    image: NonEmptyList[Any] = Field(
        validation_alias=AliasChoices("image", "images", "file", "files", "input", "inputs"),
        description="The files; of one the response has one vector, of several a list. A text is base64 or a URL.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _single_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Values arrive in lists."""
        if info.field_name == "image" or not isinstance(value, list) or len(value) != 1:
            return value
        return _value_of_text(str(info.field_name), value[0])


class EmbeddingResponse(BaseModel):
    """Response of `/txt/embed` and `/img/embed`. `embedding` has the shape of `input`."""

    embedding: Vector | list[Vector] = Field(description="Floats, or base64 of little-endian values; or a list.")
    model: str
    dimensions: int
    usage: Usage
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


def parse_text_request(body: Mapping[str, Any], settings: Settings) -> EmbeddingRequest:
    """Body of `/txt/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(TextRequest, body)
    return _request(request, request.input, Text, settings)


def parse_image_request(body: Mapping[str, Any], settings: Settings) -> EmbeddingRequest:
    """Body of `/img/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(ImageRequest, body)
    return _request(request, request.input, Image, settings)


def parse_image_form(fields: Mapping[str, list[bytes | str]], settings: Settings) -> EmbeddingRequest:
    """Form of `/img/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    form = validate_body(ImageForm, fields)
    return _request(form, form.image if len(form.image) > 1 else form.image[0], Image, settings)


def query_options(query: Mapping[str, str]) -> dict[str, Any]:
    """The options among the parameters of a URL, as a JSON body has them."""
    return {
        "dimensions" if name in _SIZES else name: _value_of_text(name, text)
        for name, text in query.items()
        if name in known_names(Options) or name == PRIORITY
    }


def _value_of_text(name: str, text: Any) -> Any:
    """An option that was sent as text, with the type that it has in JSON; unchanged if it cannot have that type."""
    if name in _NUMBERS and isinstance(text, str) and re.fullmatch("-?[0-9]{1,9}", text):
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text) if name == "normalize" else text


def _request(options: Options, given: Any, part: type[Text] | type[Image], settings: Settings) -> EmbeddingRequest:
    inputs = given if isinstance(given, list) else [given]
    check_item_count(len(inputs), settings)
    check_output_dtype(options.output_dtype, options.normalize)
    item_options = options.item_options()
    items = parse_each(inputs, lambda value: EmbeddingItem((part(value),), **item_options))
    return EmbeddingRequest(items, isinstance(given, list), options.encoding_format, options.output_dtype)


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
    upload=Upload("image", ImageForm, parse_image_form, query_options),
)
