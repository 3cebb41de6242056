"""`GET /v1/models` and `/v1/models/{id}` of OpenAI's clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from embedder.errors import NotFound
from embedder.http.dialects.dialect import ServedModel
from embedder.http.response import to_json
from embedder.inputs.items import describe_value


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


def model_response(name: str, models: Sequence[ServedModel], started_s: float) -> bytes:
    """Response body of `GET /v1/models/{id}`. Raises `NotFound`."""
    for model in models:
        if model.name == name:
            return to_json(_card(model, started_s))
    names = ", ".join(model.name for model in models)
    raise NotFound(f"model: got {describe_value(name)}; allowed: {names}")


def models_response(models: Sequence[ServedModel], started_s: float) -> bytes:
    """Response body of `GET /v1/models`."""
    return to_json({"object": "list", "data": [_card(model, started_s) for model in models]})


def _card(model: ServedModel, started_s: float) -> dict[str, Any]:
    """What clients read of a model.

    `max_model_len` tells them how long an item may be, and `root` tells `vllm bench serve` where the tokenizer is.
    """
    card = {"object": "model", "created": int(started_s), "owned_by": "qwen3-vl-embedding-service"}
    return {"id": model.name, **card, "max_model_len": model.max_input_tokens, "root": model.name, "parent": None}
