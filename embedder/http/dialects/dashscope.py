"""DashScope's multimodal embedding, the API under which Alibaba Cloud serves this model family."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, StrictBool

from embedder.engine.postprocess import Embedding
from embedder.errors import InvalidRequest
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.request_body import (
    AnyDimensions,
    NonEmptyList,
    RequestBody,
    check_item_count,
    parse_each,
    validate_body,
)
from embedder.http.response import to_json
from embedder.inputs.items import (
    EXAMPLE_DATA_URI,
    EmbeddingItem,
    describe_value,
    item_from_fields,
    refuse_unknown,
    without_nulls,
)
from embedder.settings import Settings

PATH = "/api/v1/services/embeddings/multimodal-embedding/multimodal-embedding"
_KINDS = ("text", "image", "video", "multi_images")


class Contents(RequestBody):
    """What is embedded."""

    contents: NonEmptyList[Any] = Field(description="Objects with text, image, video or multi_images.")


class Parameters(RequestBody):
    """DashScope's options."""

    dimension: AnyDimensions = Field(None, description="Matryoshka size.")
    instruct: str | None = Field(None, description="The task, as the system message.")
    fps: Any = Field(None, description="Sampling rate of videos, in frames per second.")
    enable_fusion: StrictBool = Field(False, description="All contents are one item with one vector.")
    output_type: Literal["dense"] = Field("dense")
    auto_truncation: StrictBool = Field(True, description="Cut a text over the limit; false: refuse it.")


class DashScopeRequest(RequestBody):
    """Body of DashScope's multimodal embedding."""

    input: Contents
    parameters: Parameters | None = None


class DashScopeEmbedding(BaseModel):
    """One vector. `type`: the kind of the content, or `fusion`."""

    index: int
    embedding: list[float]
    type: str


class Output(BaseModel):
    """The vectors."""

    embeddings: list[DashScopeEmbedding]


class DashScopeUsage(BaseModel):
    """Tokens embedded; those of images and videos apart from the others."""

    input_tokens: int
    image_tokens: int
    total_tokens: int


class DashScopeResponse(BaseModel):
    """Response of DashScope's multimodal embedding."""

    output: Output
    usage: DashScopeUsage
    request_id: str


@dataclass(frozen=True)
class DashScopeItems:
    """A body as items, and the `type` of each."""

    items: tuple[EmbeddingItem, ...]
    types: tuple[str, ...]


def parse_dashscope(body: Mapping[str, Any], settings: Settings) -> DashScopeItems:
    """Body -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(DashScopeRequest, body)
    parameters = request.parameters or Parameters.model_validate({})
    contents = request.input.contents
    check_item_count(len(contents), settings)
    options = {
        "instruction": parameters.instruct,
        "dimensions": parameters.dimension,
        "truncate": "end" if parameters.auto_truncation else "none",
    }
    parsed = parse_each(contents, lambda entry: _parts(entry, parameters.fps))
    if parameters.enable_fusion:
        parsed = (("fusion", [part for _, parts in parsed for part in parts]),)
    items = parse_each(parsed, lambda one: item_from_fields({**options, "content": one[1]}))
    return DashScopeItems(items, tuple(kind for kind, _ in parsed))


def _parts(entry: Any, fps: Any) -> tuple[str, list[dict[str, Any]]]:
    """One of `contents` -> its kind and its parts. `factor`, the weight of a content in a fusion, may only be 1."""
    fields = without_nulls(entry) if isinstance(entry, Mapping) else {}
    refuse_unknown(fields, {*_KINDS, "factor"})
    given = [kind for kind in _KINDS if kind in fields]
    if len(given) != 1:
        raise InvalidRequest(f"got {describe_value(entry)}; allowed: an object with one of {', '.join(_KINDS)}")
    if fields.get("factor", 1) != 1:
        raise InvalidRequest(f"factor: got {describe_value(fields['factor'])}; allowed: 1, all contents weigh the same")
    (kind,) = given
    if kind == "multi_images":
        images = fields[kind] if isinstance(fields[kind], list) else [fields[kind]]
        return kind, [{"type": "image", "image": one} for one in images]
    part = {"type": kind, kind: fields[kind], **({"fps": fps} if kind == "video" and fps is not None else {})}
    return kind, [part]


def dashscope_response(request: DashScopeItems, embeddings: Sequence[Embedding], _: ServedModel) -> bytes:
    """Embeddings -> response body."""
    vectors = [
        {"index": index, "embedding": one.vector, "type": kind}
        for index, (one, kind) in enumerate(zip(embeddings, request.types, strict=True))
    ]
    num_tokens, num_visual = (
        sum(getattr(one, name) for one in embeddings) for name in ("num_tokens", "num_visual_tokens")
    )
    usage = {"input_tokens": num_tokens - num_visual, "image_tokens": num_visual, "total_tokens": num_tokens}
    return to_json({"output": {"embeddings": vectors}, "usage": usage, "request_id": str(uuid.uuid4())})


MULTIMODAL = Dialect(
    PATH,
    "Embed, in the format of DashScope's clients",
    DashScopeRequest,
    DashScopeResponse,
    parse_dashscope,
    dashscope_response,
    examples={
        "contents": {"model": "any", "input": {"contents": [{"text": "red"}, {"image": EXAMPLE_DATA_URI}]}},
        "fusion": {
            "input": {"contents": [{"text": "red"}, {"image": EXAMPLE_DATA_URI}]},
            "parameters": {"enable_fusion": True, "dimension": 64},
        },
    },
)
