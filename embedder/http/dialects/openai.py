"""OpenAI's routes: `POST /v1/embeddings` and `GET /v1/models`, and the error bodies of everything under `/v1`.

In addition to OpenAI's own fields, `/v1/embeddings` takes items that are objects (`text`, `image`, `video`, `content`),
vLLM's `messages`, and the options of the other routes. Any `model` is accepted: a service has one, and the response
names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, StrictInt

from embedder.engine.postprocess import Embedding, check_output_dtype, quantize
from embedder.errors import EmbedderError, InvalidRequest, Overloaded, attributed_to_item
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.messages import (
    InputType,
    check_length,
    instruction_for,
    is_part,
    item_from_conversation,
    item_from_string,
    parts_from_content,
)
from embedder.http.request_body import EmbeddingRequest, Options, check_item_count, validate_body
from embedder.http.response import CUT_TEXTS, Usage, Vector, encode_vector, to_json, usage_fields
from embedder.inputs.items import (
    EXAMPLE_DATA_URI,
    EXAMPLE_IMAGE,
    EmbeddingItem,
    describe_value,
    item_from_fields,
    without_nulls,
)
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings


class EmbeddingsRequest(Options):
    """Body of `POST /v1/embeddings`: `input`, or `messages`."""

    input: Any = Field(None, description="A text or data URI, an object, or a list of them.")
    messages: Any = Field(
        None, description="vLLM's form: a conversation, which is one item, or a list of conversations."
    )
    input_type: InputType | None = Field(
        None,
        validation_alias=AliasChoices("input_type", "task"),
        description="Chooses the instruction: a query's, or the default. `instruction` takes precedence.",
    )
    truncate_prompt_tokens: StrictInt | None = Field(
        None, description="vLLM's; -1, or at least the service's own limit."
    )


class EmbeddingData(BaseModel):
    """One vector of the list."""

    object: Literal["embedding"]
    index: int
    embedding: Vector


class EmbeddingsResponse(BaseModel):
    """Response of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingData]
    model: str
    usage: Usage
    warnings: list[str] | None = Field(None, description=CUT_TEXTS)


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the service started, in seconds since 1970.")
    owned_by: str
    max_model_len: int = Field(description="Tokens of one item.")


class ModelsResponse(BaseModel):
    """Response of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class OpenAIError(BaseModel):
    """An error in OpenAI's form; `code` is the same as on the other routes."""

    message: str
    type: str
    param: str | None = Field(description="The item that failed, such as `input[3]`.")
    code: str


class OpenAIErrorResponse(BaseModel):
    """Body of every response under `/v1` with an error status."""

    error: OpenAIError


def parse_embeddings(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/v1/embeddings` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(EmbeddingsRequest, body)
    check_length("truncate_prompt_tokens", request.truncate_prompt_tokens, settings)
    if (request.input is None) == (request.messages is None):
        raise InvalidRequest(f"give either `input` or `messages`; got {'neither' if request.input is None else 'both'}")
    entries = _inputs(request.input) if request.messages is None else _conversations(request.messages)
    check_item_count(len(entries), settings)
    translate = _item_of_input if request.messages is None else item_from_conversation
    options = request.item_options()
    if options["instruction"] is None:
        options["instruction"] = instruction_for(request.input_type)
    items: list[EmbeddingItem] = []
    for index, entry in enumerate(entries):
        with attributed_to_item(index):
            items.append(item_from_fields({**options, **translate(entry)}))
            check_output_dtype(request.output_dtype, items[-1].normalize)
    return EmbeddingRequest(tuple(items), True, request.encoding_format, request.output_dtype)


def embeddings_response(request: EmbeddingRequest, embeddings: Sequence[Embedding], model: ServedModel) -> bytes:
    """Embeddings -> response body."""
    vectors = (encode_vector(quantize(one.vector, request.output_dtype), request.encoding_format) for one in embeddings)
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    usage = usage_fields(dict(enumerate(embeddings)), model.max_input_tokens)
    return to_json({"object": "list", "data": data, "model": model.name, **usage})


def models_response(model: ServedModel, started_s: float) -> bytes:
    """Response body of `GET /v1/models`. Clients read from `max_model_len` how long an item may be."""
    card = {"id": model.name, "object": "model", "created": int(started_s), "owned_by": "qwen3-vl-embedding-service"}
    return to_json({"object": "list", "data": [{**card, "max_model_len": model.max_input_tokens}]})


def openai_error_body(error: EmbedderError) -> bytes:
    """The error body that OpenAI's clients read."""
    kind = "rate_limit_error" if isinstance(error, Overloaded) else "server_error"
    if error.type == "invalid_request":
        kind = "invalid_request_error"
    param = None if error.item is None else f"input[{error.item}]"
    return to_json({"error": {"message": str(error), "type": kind, "param": param, "code": error.code}})


def _inputs(value: Any) -> Sequence[Any]:
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest(f"input: got {describe_value(value)}; allowed: a string, an object, or a list of them")
    if not value:
        raise InvalidRequest("input: got an empty list; allowed: at least one item")
    if _is_number(value[0]) or (isinstance(value[0], list) and value[0] and _is_number(value[0][0])):
        raise InvalidRequest(
            "input: got token ids; allowed: text. Token ids of another model's tokenizer have no meaning here; make "
            "the client send text, in LangChain with OpenAIEmbeddings(check_embedding_ctx_length=False)"
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _conversations(messages: Any) -> Sequence[Any]:
    """One conversation, as vLLM's clients send it, or several, as mteb's does."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"messages: got {describe_value(messages)}; allowed: a list of at least one message")
    return messages if isinstance(messages[0], list) else [messages]


def _item_of_input(entry: Any) -> dict[str, Any]:
    """One entry of `input` -> the mapping that `item_from_fields` takes."""
    if isinstance(entry, str):
        return item_from_string(entry)
    if not isinstance(entry, Mapping):
        raise InvalidRequest(
            f"got {describe_value(entry)}; allowed: a string, or an object with text, image, video or content"
        )
    if is_part(entry):
        return {"content": parts_from_content([entry])}
    fields = without_nulls(entry)
    if "content" in fields:
        return {**fields, "content": parts_from_content(fields["content"])}
    return fields


EMBEDDINGS = Dialect(
    "/v1/embeddings",
    "Embed, in the format of OpenAI's and vLLM's clients",
    EmbeddingsRequest,
    EmbeddingsResponse,
    parse_embeddings,
    embeddings_response,
    examples={
        "texts": {"input": ["red", "green"], "model": "any", "encoding_format": "float"},
        "image as data URI": {"input": EXAMPLE_DATA_URI},
        "objects": {
            "input": [
                {"text": "red"},
                {"image": EXAMPLE_IMAGE},
                {
                    "content": [
                        {"type": "text", "text": "red"},
                        {"type": "image_url", "image_url": {"url": EXAMPLE_DATA_URI}},
                    ]
                },
            ]
        },
        "messages": {
            "messages": [
                {"role": "system", "content": QUERY_INSTRUCTION},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": EXAMPLE_DATA_URI}}]},
            ]
        },
    },
)
