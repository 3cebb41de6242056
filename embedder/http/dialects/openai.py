"""OpenAI's route, `POST /v1/embeddings`, with what the clients of other servers send to it.

In addition to OpenAI's own fields it takes items that are objects (`text`, `image`, `video`, `content`), vLLM's options
and `messages` (`vllm`), Voyage's, Jina's and NVIDIA's options (`synonyms`), and the options of the other routes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import AliasChoices, Field

from embedder.engine.postprocess import check_output_dtype
from embedder.errors import InvalidRequest
from embedder.http.dialects.dialect import Dialect
from embedder.http.dialects.messages import (
    InputType,
    instruction_for,
    item_from_conversation,
    item_from_entry,
    modalities,
)
from embedder.http.dialects.openai_response import EmbeddingsResponse, embeddings_response
from embedder.http.dialects.synonyms import SynonymOptions
from embedder.http.dialects.vllm import EncodedRequest, VllmOptions, conversations
from embedder.http.request_body import check_item_count, parse_each, validate_body
from embedder.inputs.items import (
    EXAMPLE_DATA_URI,
    EXAMPLE_IMAGE,
    EmbeddingItem,
    describe_value,
    item_from_fields,
)
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings


class EmbeddingsRequest(VllmOptions, SynonymOptions):
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
    modality: Any = Field(None, description="What the strings of `input` are: text, image or video; or one for each.")


def parse_embeddings(
    body: Mapping[str, Any], settings: Settings, *, body_model: type[EmbeddingsRequest] = EmbeddingsRequest
) -> EncodedRequest:
    """Body of `/v1/embeddings` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(body_model, body)
    if (request.input is None) == (request.messages is None):
        raise InvalidRequest(f"give either `input` or `messages`; got {'neither' if request.input is None else 'both'}")
    entries = _inputs(request.input) if request.messages is None else conversations(request.messages)
    check_item_count(len(entries), settings)
    options = {**request.item_options(), **request.vllm_item_options(settings), **request.synonym_item_options()}
    if options["instruction"] is None:
        options["instruction"] = instruction_for(request.input_type)
    encoding = request.encoding(*request.synonym_encoding())
    words = modalities(request.modality, len(entries))

    def to_item(entry_and_modality: tuple[Any, str | None]) -> EmbeddingItem:
        entry, modality = entry_and_modality
        fields = item_from_entry(entry, modality) if request.messages is None else item_from_conversation(entry)
        item = item_from_fields({**options, **request.with_fps(fields)})
        check_output_dtype(encoding.output_dtype, item.normalize)
        return item

    return EncodedRequest(parse_each(zip(entries, words, strict=True), to_item), encoding)


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

# SageMaker's contract names the path, vLLM's the body
INVOCATIONS = dataclasses.replace(EMBEDDINGS, path="/invocations", summary="Embed, on the path of SageMaker")
