"""OpenAI's routes: body of `POST /v1/embeddings` -> request; vectors, models and errors -> OpenAI's JSON.

Beyond OpenAI's own fields: items that are objects (`text`, `image`, `video`, `content`), vLLM's `messages`, and the
options of the other routes, for `extra_body`. Any name of a model is taken, and none is needed: one service serves one
model, and the answer names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field

from embedder.engine.postprocess import Embedding, check_output_dtype, quantize
from embedder.errors import InvalidRequest, Overloaded, attributed_to_item
from embedder.http.messages import (
    InputType,
    check_length,
    instruction_for,
    is_part,
    item_from_conversation,
    item_from_string,
    parts_from_content,
)
from embedder.http.request_body import EmbeddingRequest, Options, check_item_count, validate_body
from embedder.http.response import Usage, Vector, encode_vector, to_json, usage_fields
from embedder.inputs.items import EmbeddingItem, describe_value, item_from_fields, without_nulls
from embedder.settings import Settings

IGNORED = "Accepted for the clients that send it; changes nothing here."


class EmbeddingsRequest(Options):
    """Body of `POST /v1/embeddings`: `input`, or `messages`."""

    input: Any = Field(None, description="A text or data URI, an object, or a list of them.")
    messages: Any = Field(
        None, description="One conversation (one item) as vLLM's clients write it, or a list of them."
    )
    model: Any = Field(None, description="Any name: there is one model here, and the answer says which.")
    input_type: InputType | None = Field(
        None,
        validation_alias=AliasChoices("input_type", "task"),
        description="Queries get the query instruction, all others the default; `instruction` goes before.",
    )
    truncate_prompt_tokens: int | None = Field(
        None, description="vLLM's. Only -1 or a number that is not below the service's own limit."
    )
    user: Any = Field(None, description=IGNORED)
    provider: Any = Field(None, description=IGNORED)
    priority: Any = Field(None, description=IGNORED)
    request_id: Any = Field(None, description=IGNORED)
    add_generation_prompt: Any = Field(None, description=IGNORED)
    continue_final_message: Any = Field(None, description=IGNORED)
    add_special_tokens: Any = Field(None, description=IGNORED)


class EmbeddingData(BaseModel):
    """One vector of the list."""

    object: Literal["embedding"]
    index: int
    embedding: Vector


class EmbeddingsResponse(BaseModel):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingData]
    model: str
    usage: Usage
    warnings: list[str] | None = Field(None, description="What was cut, item by item; absent if nothing was.")


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the service started, in seconds since 1970.")
    owned_by: str
    max_model_len: int = Field(description="Tokens of one item.")


class ModelsResponse(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class OpenAIError(BaseModel):
    """What went wrong, in OpenAI's words; `code` is ours."""

    message: str
    type: str
    param: str | None = Field(description="The item at fault, as `input[3]`.")
    code: str


class OpenAIErrorResponse(BaseModel):
    """Body of every answer under `/v1` that is not 200."""

    error: OpenAIError


def parse_embeddings(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Body of `/v1/embeddings` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    wire = validate_body(EmbeddingsRequest, body)
    check_length("truncate_prompt_tokens", wire.truncate_prompt_tokens, settings)
    if (wire.input is None) == (wire.messages is None):
        raise InvalidRequest("give either `input` or `messages`")
    entries = _inputs(wire.input) if wire.messages is None else _conversations(wire.messages)
    check_item_count(len(entries), settings)
    translate = _item_of_input if wire.messages is None else item_from_conversation
    options = wire.item_options()
    if options["instruction"] is None:
        options["instruction"] = instruction_for(wire.input_type)
    items: list[EmbeddingItem] = []
    for index, entry in enumerate(entries):
        with attributed_to_item(index):
            items.append(item_from_fields({**options, **translate(entry)}))
            check_output_dtype(wire.output_dtype, items[-1].normalize)
    return EmbeddingRequest(tuple(items), True, wire.encoding_format, wire.output_dtype)


def embeddings_response(request: EmbeddingRequest, embeddings: Sequence[Embedding], model: str, limit: int) -> bytes:
    """The answer to a request. `limit` is the number of tokens that texts were cut to."""
    vectors = (encode_vector(quantize(one.vector, request.output_dtype), request.encoding_format) for one in embeddings)
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return to_json({"object": "list", "data": data, "model": model, **usage_fields(dict(enumerate(embeddings)), limit)})


def models_response(model: str, started_s: float, max_input_tokens: int) -> bytes:
    """The one model. Clients read from `max_model_len` how long an item may be."""
    card = {"id": model, "object": "model", "created": int(started_s), "owned_by": "qwen3-vl-embedding-service"}
    return to_json({"object": "list", "data": [{**card, "max_model_len": max_input_tokens}]})


def openai_error_body(error: Mapping[str, Any]) -> bytes:
    """Our error's fields (`response.ErrorBody`) as OpenAI's clients read them."""
    kind = "rate_limit_error" if error["code"] == Overloaded.code else "server_error"
    if error["type"] == "invalid_request":
        kind = "invalid_request_error"
    param = None if error["item"] is None else f"input[{error['item']}]"
    return to_json({"error": {"message": error["message"], "type": kind, "param": param, "code": error["code"]}})


def _inputs(value: Any) -> Sequence[Any]:
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest(f"input: got {describe_value(value)}; allowed: a string, an object, or a list of them")
    if not value:
        raise InvalidRequest("input: got an empty list; allowed: at least one item")
    if _is_number(value[0]) or (isinstance(value[0], list) and value[0] and _is_number(value[0][0])):
        raise InvalidRequest(
            "input: got token ids; allowed: text, because this model has a tokenizer of its own. Let the client send "
            "text: in LangChain OpenAIEmbeddings(check_embedding_ctx_length=False)"
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _conversations(messages: Any) -> Sequence[Any]:
    """One conversation, or several: vLLM takes the first, mteb's client sends the second."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"messages: got {describe_value(messages)}; allowed: a list of at least one message")
    return messages if isinstance(messages[0], list) else [messages]


def _item_of_input(entry: Any) -> dict[str, Any]:
    """One entry of `input` -> an item in the native form."""
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
