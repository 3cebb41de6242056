"""Cohere's routes: `POST /v2/embed`, and `POST /v1/embed`, which langchain-cohere uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, StrictInt

from embedder.errors import InvalidRequest
from embedder.http.dialects.cohere_response import (
    CohereEmbedResponse,
    CohereRequest,
    CohereV1Response,
    EmbeddingType,
    cohere_response,
)
from embedder.http.dialects.dialect import Dialect
from embedder.http.dialects.messages import InputType, instruction_for, parts_from_content, text_limit
from embedder.http.request_body import (
    AnyDimensions,
    NonEmptyList,
    RequestBody,
    check_item_count,
    parse_each,
    validate_body,
)
from embedder.inputs.items import (
    EXAMPLE_DATA_URI,
    EmbeddingItem,
    describe_value,
    item_from_fields,
    refuse_unknown,
)
from embedder.settings import Settings


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


def parse_cohere(body: Mapping[str, Any], settings: Settings) -> CohereRequest:
    """Body of `/v2/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    return _request(validate_body(CohereEmbedRequest, body), settings, "2")


def parse_cohere_v1(body: Mapping[str, Any], settings: Settings) -> CohereRequest:
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


def _content(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise InvalidRequest(f"got {describe_value(entry)}; allowed: an object with content")
    refuse_unknown(entry, {"content"})
    return {"content": parts_from_content(entry.get("content"))}


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
