"""Messages, content parts and input types of OpenAI's, Cohere's, vLLM's, Jina's and OpenRouter's clients.

They become the mapping that `inputs.items.item_from_fields` takes. These fields are accepted because clients send them,
and have no effect: `detail`, `uuid` and `format` of a part, `name` of a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from embedder.errors import InvalidRequest
from embedder.inputs.data_uri import media_kind
from embedder.inputs.items import describe_value, refuse_unknown, without_nulls
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings

InputType = Literal[  # Cohere's and OpenRouter's names, NVIDIA's and Voyage's, Jina's tasks
    "search_query",
    "search_document",
    "classification",
    "clustering",
    "image",
    "query",
    "passage",
    "document",
    "retrieval.query",
    "retrieval.passage",
    "text-matching",
    "code.query",
    "code.passage",
    "separation",
]
_QUERIES = ("search_query", "query", "retrieval.query", "code.query")

PART_TYPES = {  # `type` of a part -> what it is
    "text": "text",
    "input_text": "text",
    "image": "image",
    "image_url": "image",
    "image_base64": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "video_base64": "video",
    "input_video": "video",
}


def instruction_for(input_type: InputType | None) -> str | None:
    """The instruction for an input type: the query's for queries, None (the default) for all others."""
    return QUERY_INSTRUCTION if input_type in _QUERIES else None


def text_limit(name: str, tokens: int | None, settings: Settings) -> int | None:
    """A caller's limit on the tokens of a text, as an item takes it; -1 or a high one stands for the service's own."""
    if tokens is None or tokens == -1 or tokens >= settings.max_input_tokens:
        return None
    if tokens < 1:
        raise InvalidRequest(f"{name}: got {tokens}; allowed: -1, or from 1 to {settings.max_input_tokens}")
    return tokens


def modalities(modality: Any, num_items: int) -> list[str | None]:
    """NVIDIA's and infinity's `modality`, one word or one for each item -> what each string of `input` is."""
    given = modality if isinstance(modality, list) else [modality] * num_items
    words = [word.lower() if isinstance(word, str) else word for word in given]
    if len(words) != num_items or any(word not in (None, "text", "image", "video") for word in words):
        raise InvalidRequest(
            f"modality: got {describe_value(modality)}; allowed: text, image or video, or a list with one for each item"
        )
    return words


def item_from_string(text: str, modality: str | None = None) -> dict[str, Any]:
    """A string is a text, unless it is the data URI of an image or video. `modality`: what the caller says it is."""
    return {modality or media_kind(text) or "text": text}


def item_from_conversation(messages: Any) -> dict[str, Any]:
    """A conversation -> an item: the user message is the content, the system message the instruction.

    An empty assistant message is accepted: vLLM's clients send one for its header, which the prompt has anyway. Raises
    `InvalidRequest` for any other dialogue: the model was not trained on one.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequest(f"messages: got {describe_value(messages)}; allowed: a list of messages")
    fields: dict[str, Any] = {}
    for message in messages:
        role, content = _role_and_content(message)
        if role in ("system", "developer") and "instruction" not in fields:
            fields["instruction"] = _plain_text(content)
        elif role == "user" and "content" not in fields:
            fields["content"] = parts_from_content(content)
        elif role != "assistant" or _plain_text(content):
            raise InvalidRequest(
                f"messages: got a second or unusable message of role {describe_value(role)}; allowed: one system "
                "message (the instruction), one user message (what to embed), an empty assistant message"
            )
    return fields


def parts_from_content(content: Any) -> list[dict[str, Any]]:
    """The content of a message or input, a string or a list of parts, as parts that `item_from_fields` takes."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"content: got {describe_value(content)}; allowed: a string or a list of parts")
    return [_part(part) for part in content]


def item_from_entry(entry: Any, modality: str | None = None) -> dict[str, Any]:
    """An entry of a list of items in any client's format: a string, a part, or an object whose `content` has parts."""
    match entry:
        case str():
            return item_from_string(entry, modality)
        case Mapping() if "type" in entry:
            return {"content": parts_from_content([entry])}
        case Mapping():
            fields = without_nulls(entry)
            return {**fields, "content": parts_from_content(fields["content"])} if "content" in fields else fields
    raise InvalidRequest(
        f"got {describe_value(entry)}; allowed: a text, or an object with text, image, video or content"
    )


def _part(part: Any) -> dict[str, Any]:
    """`{"type": "image_url", "image_url": {"url": ..}}` and the like -> `{"type": "image", "image": ..}`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    media = PART_TYPES.get(kind.lower()) if isinstance(kind, str) else None
    if media is None:
        raise InvalidRequest(
            f"a part of `content` has one of the types {', '.join(PART_TYPES)}; got {describe_value(part)}"
        )
    part = without_nulls(part)
    names = [name for name in part if PART_TYPES.get(name) == media]
    own = {"fps"} & set(part) if media == "video" else set()
    refuse_unknown(part, {"type", "detail", "uuid", *names, *own})
    if len(names) != 1:
        raise InvalidRequest(
            f"a part of type {kind}: got {describe_value(part)}; allowed: exactly one field with its content, `{kind}`"
        )
    return {"type": media, media: _address(part[names[0]]), **{name: part[name] for name in own}}


def _address(value: Any) -> Any:
    """The value of `{"url": ..}` or `{"data": ..}`; anything else unchanged."""
    if not isinstance(value, Mapping):
        return value
    value = without_nulls(value)
    refuse_unknown(value, {"url", "data", "detail", "format"})
    return value.get("url", value.get("data"))


def _role_and_content(message: Any) -> tuple[Any, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"messages: got {describe_value(message)}; allowed: objects with role and content")
    refuse_unknown(without_nulls(message), {"role", "content", "name"})
    role = message.get("role")
    return role.lower() if isinstance(role, str) else role, message.get("content")


def _plain_text(content: Any) -> str:
    """The text of a message that may hold only text."""
    parts = parts_from_content("" if content is None else content)
    if any(part["type"] != "text" or not isinstance(part["text"], str) for part in parts):
        raise InvalidRequest(f"messages: got {describe_value(content)} in a system or assistant message; allowed: text")
    return "".join(part["text"] for part in parts)
