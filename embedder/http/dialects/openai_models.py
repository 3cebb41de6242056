"""`GET /v1/models` of OpenAI's clients, also `/models` of infinity's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from embedder.http.dialects.dialect import ServedModel
from embedder.http.response import to_json


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the service started, in seconds since 1970.")
    owned_by: str
    max_model_len: int = Field(description="Tokens of one item.")
    root: str = Field(description="vLLM's: where the model's tokenizer is; the same as `id`.")
    parent: None = Field(None, description="vLLM's: null.")


class ModelsResponse(BaseModel):
    """Response of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


def models_response(models: Sequence[ServedModel], started_s: float) -> bytes:
    """Response body of `GET /v1/models`.

    `max_model_len` tells clients how long an item may be, and `root` tells `vllm bench serve` where the tokenizer is.
    """
    card = {"object": "model", "created": int(started_s), "owned_by": "qwen3-vl-embedding-service"}
    cards = [
        {"id": model.name, **card, "max_model_len": model.max_input_tokens, "root": model.name, "parent": None}
        for model in models
    ]
    return to_json({"object": "list", "data": cards})
