"""vLLM's `POST /pooling`: the same vectors as `/v1/embeddings`, in a field called `data`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, Field

from embedder.errors import InvalidRequest
from embedder.http.dialects import openai
from embedder.http.dialects.dialect import Dialect
from embedder.http.dialects.openai_response import OpenAIUsage, embeddings_response
from embedder.http.dialects.vllm import EncodedRequest
from embedder.http.response import Vector
from embedder.inputs.items import describe_value
from embedder.settings import Settings


class PoolingRequest(openai.EmbeddingsRequest):
    """Body of `POST /pooling`."""

    task: Literal["embed"] = Field("embed", description="This model has no other task.")


class PoolingData(BaseModel):
    """One vector of the list."""

    object: Literal["data"]
    index: int
    data: Vector


class PoolingResponse(BaseModel):
    """Response of `POST /pooling`."""

    id: str
    object: Literal["list"]
    created: int
    data: list[PoolingData]
    model: str
    usage: OpenAIUsage


def parse_pooling(body: Mapping[str, Any], settings: Settings) -> EncodedRequest:
    """Body of `/pooling` -> request. Raises `InvalidRequest` for a task other than `embed`."""
    task = body.get("task")
    if task is not None and not (isinstance(task, str) and task.lower() == "embed"):
        raise InvalidRequest(f"Unsupported task: {describe_value(task)}; allowed: embed, this model has no other")
    return openai.parse_embeddings({name: value for name, value in body.items() if name != "task"}, settings)


POOLING = Dialect(
    "/pooling",
    "Embed, in the format of vLLM's pooling clients",
    PoolingRequest,
    PoolingResponse,
    parse_pooling,
    partial(embeddings_response, name="data"),
    examples={"texts": {"input": ["red"], "task": "embed"}},
)
