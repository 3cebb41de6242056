"""The Open Inference Protocol (KServe v2) over HTTP: `POST /v2/models/{model}/infer`, and metadata for probes.

The input tensor is called `text`, `image` or `input` (a text, or the data URI of an image or video), of datatype BYTES.
Data is JSON: the binary extension is refused. Any model name in the path is the served one; its only version is 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, Field, StrictInt

from embedder.engine.postprocess import Embedding
from embedder.errors import InvalidRequest, NotFound, counted
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.messages import item_from_string
from embedder.http.request_body import RequestBody, check_item_count, parse_each, validate_body
from embedder.http.response import to_json
from embedder.inputs.items import EmbeddingItem, check_text, describe_value, item_from_fields, refuse_unknown
from embedder.settings import Settings

TensorName = Literal["text", "image", "input"]
_OPTIONS = {"instruction", "dimensions", "normalize", "truncate"}
# Of Triton's client; its levels of priority are the server's own, and its time limit is also the client's.
_IGNORED = {"binary_data_output", "priority", "timeout"}
# What may follow a model's name in KServe's and Triton's protocols, and is not served.
_OTHER_PAGES = frozenset({"config", "generate", "generate_stream", "load", "stats", "trace", "unload", "versions"})


class Tensor(RequestBody):
    """An input tensor."""

    name: TensorName
    shape: list[StrictInt]
    datatype: Literal["BYTES"]
    data: list[Any]
    parameters: dict[str, Any] | None = None


class InferRequest(RequestBody):
    """Body of `POST /v2/models/{model}/infer`."""

    id: str | None = Field(None, description="The response repeats it.")
    inputs: list[Tensor] = Field(min_length=1, max_length=1)
    outputs: Any = Field(None, description="No effect: there is one output.")
    parameters: dict[str, Any] | None = Field(None, description="instruction, dimensions, normalize, truncate.")


class OutputTensor(BaseModel):
    """The vectors, one after the other."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class InferResponse(BaseModel):
    """Response of `POST /v2/models/{model}/infer`."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@dataclass(frozen=True)
class InferItems:
    """A body as items, and the caller's id."""

    items: tuple[EmbeddingItem, ...]
    id: str | None


def parse_infer(body: Mapping[str, Any], settings: Settings) -> InferItems:
    """Body -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(InferRequest, body)
    check_text("id", request.id or "")
    (tensor,) = request.inputs
    refuse_unknown(tensor.parameters or {}, set())
    options = {name: value for name, value in (request.parameters or {}).items() if name not in _IGNORED}
    refuse_unknown(options, _OPTIONS)
    data = _flat(tensor.data)
    if not data or _num_values(tensor.shape, len(data)) != len(data):
        raise InvalidRequest(f"inputs: got {counted(len(data), 'value')} for the shape {describe_value(tensor.shape)}")
    check_item_count(len(data), settings)

    def to_item(value: Any) -> EmbeddingItem:
        if not isinstance(value, str):
            raise InvalidRequest(f"got {describe_value(value)}; allowed: a string")
        content: dict[str, Any] = item_from_string(value) if tensor.name == "input" else {tensor.name: value}
        return item_from_fields({**options, **content})

    return InferItems(parse_each(data, to_item), request.id)


def _num_values(shape: Sequence[int], limit: int) -> int:
    """The number of values of a tensor, or more than `limit`: numbers of any size may be in `shape`."""
    count = 1
    for size in shape:
        count *= max(0, size)
        if count > limit:
            break
    return count


def _flat(data: Sequence[Any]) -> list[Any]:
    """The values of a tensor, whose data may be nested like its shape: [n] or [n, 1]."""
    return [value for entry in data for value in (entry if isinstance(entry, list) else [entry])]


def infer_response(request: InferItems, embeddings: Sequence[Embedding], model: ServedModel) -> bytes:
    """Embeddings -> response body."""
    vectors = np.stack([one.vector for one in embeddings])  # of one size: `dimensions` applies to the whole request
    output = {"name": "embedding", "shape": list(vectors.shape), "datatype": "FP32", "data": vectors.ravel()}
    fields = {"model_name": model.name, "model_version": "1", "outputs": [output]}
    return to_json(fields if request.id is None else {**fields, "id": request.id})


def check_model_name(name: str, served: Collection[str]) -> None:
    """Raise `NotFound` unless a part of a path can be a model's name, which may be followed by `/versions/1`.

    A name that is not `served` is any name or hub id: it has one slash at most.
    """
    name = name.removesuffix("/versions/1")
    rest = name.partition("/")[2]
    if name not in served and ("/" in rest or rest in _OTHER_PAGES):
        raise NotFound(f"no such model or version: {name[:100]}; allowed: any model name, and version 1")


def server_metadata(model: ServedModel) -> dict[str, Any]:
    """Body of `GET /v2`."""
    return {"name": "qwen3-vl-embedding-service", "version": model.info.get("version", ""), "extensions": []}


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """Body of `GET /v2/models/{model}`."""
    inputs = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in get_args(TensorName)]
    outputs = [{"name": "embedding", "datatype": "FP32", "shape": [-1, model.info["hidden_size"]]}]
    return {"name": model.name, "versions": ["1"], "platform": "pytorch", "inputs": inputs, "outputs": outputs}


INFER = Dialect(
    "/v2/models/{model}/infer",
    "Embed, in the Open Inference Protocol (KServe v2)",
    InferRequest,
    InferResponse,
    parse_infer,
    infer_response,
    examples={
        "texts": {
            "id": "1",
            "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["red", "green"]}],
            "parameters": {"dimensions": 64},
        }
    },
)
