"""Ollama's routes: `POST /api/embed`, the older `POST /api/embeddings`, `GET /api/tags`, `GET /api/version`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictBool

from embedder.engine.postprocess import Embedding
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.messages import item_from_string
from embedder.http.request_body import RequestBody, SizeOrZero, check_item_count, parse_each, validate_body
from embedder.http.response import to_json
from embedder.inputs.items import EmbeddingItem, item_from_fields
from embedder.settings import Settings


class OllamaEmbedRequest(RequestBody):
    """Body of `POST /api/embed`."""

    input: str | Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="Texts, or data URIs of images or videos. None of them, or an empty text: no vectors."
    )
    truncate: StrictBool = Field(True, description="Cut a text over the limit; false: refuse it.")
    dimensions: SizeOrZero = Field(None, description="Matryoshka size; 0: all values.")
    options: dict[str, Any] | None = Field(None, description="No effect: options of text generation and of loading.")


class OllamaEmbedResponse(BaseModel):
    """Response of `POST /api/embed`. Both durations are 0; the response's headers have them, in milliseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaPromptRequest(RequestBody):
    """Body of `POST /api/embeddings`."""

    prompt: str | None = Field(
        None, description="A text, or the data URI of an image or video. An empty text, or none: an empty vector."
    )
    options: dict[str, Any] | None = Field(None, description="No effect.")


class OllamaPromptResponse(BaseModel):
    """Response of `POST /api/embeddings`."""

    embedding: list[float]


@dataclass(frozen=True)
class OllamaRequest:
    """A body as items."""

    items: tuple[EmbeddingItem, ...]


def parse_embed(body: Mapping[str, Any], settings: Settings) -> OllamaRequest:
    """Body of `/api/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(OllamaEmbedRequest, body)
    match request.input:
        case list():
            inputs = request.input
        case None | "":
            inputs = []  # which clients send to load the model
        case _:
            inputs = [request.input]
    check_item_count(len(inputs), settings)
    options = {"dimensions": request.dimensions, "truncate": "end" if request.truncate else "none"}
    return OllamaRequest(parse_each(inputs, lambda text: item_from_fields({**options, **item_from_string(text)})))


def parse_prompt(body: Mapping[str, Any], settings: Settings) -> OllamaRequest:
    """Body of `/api/embeddings` -> request. Raises `InvalidRequest`."""
    request = validate_body(OllamaPromptRequest, body)
    return OllamaRequest((item_from_fields(item_from_string(request.prompt)),) if request.prompt else ())


def embed_response(_: OllamaRequest, embeddings: Sequence[Embedding], model: ServedModel) -> bytes:
    """Embeddings -> body of `/api/embed`."""
    return to_json(
        {
            "model": model.name,
            "embeddings": [one.vector for one in embeddings],
            "total_duration": 0,
            "load_duration": 0,
            "prompt_eval_count": sum(one.num_tokens for one in embeddings),
        }
    )


def prompt_response(_: OllamaRequest, embeddings: Sequence[Embedding], __: ServedModel) -> bytes:
    """Embeddings -> body of `/api/embeddings`."""
    return to_json({"embedding": embeddings[0].vector if embeddings else []})


def tags(model: ServedModel) -> dict[str, Any]:
    """Body of `GET /api/tags`: the one model, as if it had been pulled when the service started."""
    details = {"format": "safetensors", "family": "qwen3vl", "parameter_size": "", "quantization_level": ""}
    modified = datetime.fromtimestamp(model.clock_offset_s, UTC).isoformat()
    return {
        "models": [
            {
                "name": model.name,
                "model": model.name,
                "modified_at": modified,
                "size": 0,
                "digest": model.info["revision"],
                "details": details,
            }
        ]
    }


EMBED = Dialect(
    "/api/embed",
    "Embed, in the format of Ollama's clients",
    OllamaEmbedRequest,
    OllamaEmbedResponse,
    parse_embed,
    embed_response,
    examples={"texts": {"model": "any", "input": ["red", "green"]}},
)
PROMPT = Dialect(
    "/api/embeddings",
    "Embed one text, in the older format of Ollama's clients",
    OllamaPromptRequest,
    OllamaPromptResponse,
    parse_prompt,
    prompt_response,
    examples={"text": {"model": "any", "prompt": "red"}},
)
