"""Voyage's route for mixtures: `POST /v1/multimodalembeddings`. Its route for texts is OpenAI's, see `synonyms`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, StrictBool

from embedder.engine.postprocess import Embedding, OutputDtype, quantize, to_base64
from embedder.errors import InvalidRequest
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.messages import InputType, instruction_for, parts_from_content
from embedder.http.request_body import (
    AnyDimensions,
    NonEmptyList,
    RequestBody,
    check_item_count,
    parse_each,
    validate_body,
)
from embedder.http.response import Vector, to_json
from embedder.inputs.items import (
    EXAMPLE_DATA_URI,
    EmbeddingItem,
    describe_value,
    item_from_fields,
    refuse_unknown,
    without_nulls,
)
from embedder.settings import Settings


class VoyageRequest(RequestBody):
    """Body of `POST /v1/multimodalembeddings`."""

    inputs: NonEmptyList[Any] = Field(description="Mixtures of texts, images and videos, in your order.")
    input_type: InputType | None = Field(None, description="Chooses the instruction: a query's, or the default.")
    truncation: StrictBool = Field(True, description="Cut a text over the limit; false: refuse it.")
    output_dimension: AnyDimensions = Field(None, description="Matryoshka size.")
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] = Field("float")
    output_encoding: Literal["base64"] | None = Field(None, description="The vector's bytes in base64.")
    encoding_format: Literal["base64"] | None = Field(None, description="The same as `output_encoding`.")


class VoyageData(BaseModel):
    """One vector of the list."""

    object: Literal["embedding"]
    index: int
    embedding: Vector


class VoyageUsage(BaseModel):
    """Tokens embedded. Pixels are those that the model sees, after resizing."""

    text_tokens: int
    image_pixels: int
    video_pixels: int
    total_tokens: int


class VoyageResponse(BaseModel):
    """Response of `POST /v1/multimodalembeddings`."""

    object: Literal["list"]
    data: list[VoyageData]
    model: str
    usage: VoyageUsage


@dataclass(frozen=True)
class VoyageItems:
    """A body as items, and the form of the vectors that it asks for."""

    items: tuple[EmbeddingItem, ...]
    output_dtype: OutputDtype
    is_base64: bool


def parse_voyage(body: Mapping[str, Any], settings: Settings) -> VoyageItems:
    """Body of `/v1/multimodalembeddings` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(VoyageRequest, body)
    check_item_count(len(request.inputs), settings)
    options = {
        "instruction": instruction_for(request.input_type),
        "dimensions": request.output_dimension,
        "truncate": "end" if request.truncation else "none",
    }
    items = parse_each(request.inputs, lambda entry: item_from_fields({**options, "content": _parts(entry)}))
    dtype: OutputDtype = "float32" if request.output_dtype == "float" else request.output_dtype
    return VoyageItems(items, dtype, bool(request.output_encoding or request.encoding_format))


def voyage_response(request: VoyageItems, embeddings: Sequence[Embedding], model: ServedModel) -> bytes:
    """Embeddings -> response body."""
    vectors = (quantize(one.vector, request.output_dtype) for one in embeddings)
    data = [
        {"object": "embedding", "index": index, "embedding": to_base64(vector) if request.is_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    num_tokens = sum(one.num_tokens for one in embeddings)
    num_visual = sum(one.num_visual_tokens for one in embeddings)
    pixels_per_token = model.info["pixels"]["multiple_of"] ** 2 if model.info else 0
    usage = {
        "text_tokens": num_tokens - num_visual,
        "image_pixels": num_visual * pixels_per_token,  # of videos too: the counts are not kept apart
        "video_pixels": 0,
        "total_tokens": num_tokens,
    }
    return to_json({"object": "list", "data": data, "model": model.name, "usage": usage})


def _parts(entry: Any) -> list[dict[str, Any]]:
    if not isinstance(entry, Mapping):
        raise InvalidRequest(f"got {describe_value(entry)}; allowed: an object with content")
    fields = without_nulls(entry)
    refuse_unknown(fields, {"content"})
    return parts_from_content(fields.get("content"))


MULTIMODAL = Dialect(
    "/v1/multimodalembeddings",
    "Embed mixtures, in the format of Voyage's clients",
    VoyageRequest,
    VoyageResponse,
    parse_voyage,
    voyage_response,
    examples={
        "mixture": {
            "model": "any",
            "inputs": [
                {
                    "content": [
                        {"type": "text", "text": "red"},
                        {"type": "image_base64", "image_base64": EXAMPLE_DATA_URI},
                    ]
                }
            ],
        }
    },
)
