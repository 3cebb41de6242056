"""Responses of OpenAI's `/v1/embeddings`, and of the routes that have the same body."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from embedder.engine.postprocess import Embedding
from embedder.http.dialects.dialect import ServedModel
from embedder.http.dialects.vllm import EncodedRequest, bytes_response, encoded_vector
from embedder.http.response import CUT_TEXTS, Usage, Vector, to_json, usage_fields


class OpenAIUsage(Usage):
    """Tokens embedded, including instruction and prompt template."""

    completion_tokens: int


class EmbeddingData(BaseModel):
    """One vector of the list."""

    object: Literal["embedding"]
    index: int
    embedding: Vector


class EmbeddingsResponse(BaseModel):
    """Response of `POST /v1/embeddings`."""

    id: str
    object: Literal["list"]
    created: int = Field(description="Seconds since 1970.")
    data: list[EmbeddingData]
    model: str
    usage: OpenAIUsage
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


def embeddings_response(
    request: EncodedRequest, embeddings: Sequence[Embedding], model: ServedModel, *, name: str = "embedding"
) -> bytes | Response:
    """Embeddings -> response body. `name`: the field that holds the vector."""
    usage = usage_fields(dict(enumerate(embeddings)), model.max_input_tokens)
    usage["usage"]["completion_tokens"] = 0
    about = {"id": f"embd-{uuid.uuid4().hex}", "object": "list", "created": model.now(), "model": model.name}
    if request.encoding.is_bytes:
        return bytes_response(request, embeddings, {**about, **usage})
    data = [
        {"object": name, "index": index, name: encoded_vector(one.vector, request.encoding)}
        for index, one in enumerate(embeddings)
    ]
    return to_json({**about, "data": data, **usage})
