"""`POST /predict`: what Vertex AI sends to a custom container, `instances` and `parameters`.

Vertex AI names a container's port and routes in variables. The image listens on that port, and `Routes` has the routes
as `other_names`. An instance is an item as in `POST /embed`, and a prediction its vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from embedder.engine.postprocess import Embedding, check_output_dtype, quantize
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.messages import item_from_string
from embedder.http.request_body import (
    EmbeddingRequest,
    NonEmptyList,
    Options,
    RequestBody,
    check_item_count,
    parse_each,
    validate_body,
)
from embedder.http.response import Vector, encode_vector, to_json
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, item_from_fields, without_nulls
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings

PATH = "/predict"


class PredictRequest(RequestBody):
    """Body of `POST /predict`."""

    instances: NonEmptyList[Any] = Field(
        description="What to embed: texts or data URIs, or objects as in the items of `POST /embed`."
    )
    parameters: Options | None = Field(None, description="Options of all instances without their own.")


class PredictResponse(BaseModel):
    """Response of `POST /predict`."""

    predictions: list[Vector] = Field(description="One vector for each instance, in order.")


def parse_predict(body: Mapping[str, Any], settings: Settings) -> EmbeddingRequest:
    """Body of `/predict` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(PredictRequest, body)
    check_item_count(len(request.instances), settings)
    options = request.parameters or Options.model_validate({})

    def to_item(instance: Any) -> EmbeddingItem:
        fields = item_from_string(instance) if isinstance(instance, str) else instance
        if isinstance(fields, Mapping):
            fields = _whole_dimensions({**options.item_options(), **without_nulls(fields)})
        item = item_from_fields(fields)
        check_output_dtype(options.output_dtype, item.normalize)
        return item

    items = parse_each(request.instances, to_item)
    return EmbeddingRequest(items, True, options.encoding_format, options.output_dtype)


def _whole_dimensions(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with 64 in the place of 64.0: numbers that pass through Vertex AI's gRPC are floats."""
    size = fields["dimensions"]
    return {**fields, "dimensions": int(size)} if isinstance(size, float) and size.is_integer() else fields


def predict_response(request: EmbeddingRequest, embeddings: Sequence[Embedding], _: ServedModel) -> bytes:
    """Embeddings -> response body."""
    vectors = [encode_vector(quantize(one.vector, request.output_dtype), request.encoding_format) for one in embeddings]
    return to_json({"predictions": vectors})


PREDICT = Dialect(
    PATH,
    "Embed, as a custom container of Vertex AI",
    PredictRequest,
    PredictResponse,
    parse_predict,
    predict_response,
    examples={
        "texts": {"instances": ["red", "green"], "parameters": {"dimensions": 64}},
        "text, image, mixture": {
            "instances": [
                {"text": "a red square", "instruction": QUERY_INSTRUCTION},
                {"image": EXAMPLE_IMAGE},
                {"content": [{"type": "text", "text": "a swatch: "}, {"type": "image", "image": EXAMPLE_IMAGE}]},
            ]
        },
    },
)
