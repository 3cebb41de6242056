"""What OpenAI's, Cohere's, vLLM's, Jina's and OpenRouter's clients write -> items in the native form.

The native form (`request.item_from_fields`) is a mapping; nothing here looks inside a text or a picture. Of what
clients send along and a fixed prompt has no use for, this is taken and left aside by name: `detail`, `uuid` and
`format` of a part, `name` of a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from embedder.errors import InvalidRequest
from embedder.inputs.items import describe_value, refuse_unknown, without_nulls
from embedder.settings import Settings

QUERY_INSTRUCTION = "Retrieve images or text relevant to the user's query."  # the model card's own, for queries

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
]
_QUERIES = ("search_query", "query", "retrieval.query", "code.query")

PART_TYPES = {  # what a part may call itself, and what it is
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
    """A query's instruction for the types that are queries; None, the default, for all others."""
    return QUERY_INSTRUCTION if input_type in _QUERIES else None


def check_length(name: str, tokens: int | None, settings: Settings) -> None:
    """Of a client's own limit on tokens: every text is cut by the service's, so a lower one cannot be kept."""
    if tokens not in (None, -1) and tokens < settings.max_input_tokens:
        raise InvalidRequest(
            f"{name}: got {tokens}; allowed: -1, or from {settings.max_input_tokens} (the service's max_input_tokens)"
        )


def item_from_string(text: str) -> dict[str, Any]:
    """A string is a text, unless it is the data URI of a picture or clip."""
    for media in ("image", "video"):
        if text.startswith(f"data:{media}/"):
            return {media: text}
    return {"text": text}


def item_from_conversation(messages: Any) -> dict[str, Any]:
    """One user message is the content, a system message the instruction.

    An empty message of the assistant may stand at the end: vLLM's clients send it for the sake of its header, which
    our prompt has anyway. Raises `InvalidRequest` for any other dialogue: the model was not trained on it.
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
    """The content of a message or input, a string or a list of parts, with every part in the native form."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"content: got {describe_value(content)}; allowed: a string or a list of parts")
    return [_part(part) for part in content]


def is_part(fields: Mapping[str, Any]) -> bool:
    """Whether an object is one part on its own, as in `{"type": "image_url", ..}`."""
    return "type" in fields


def _part(part: Any) -> dict[str, Any]:
    """`{"type": "image_url", "image_url": {"url": ..}}` and its relatives -> `{"type": "image", "image": ..}`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    media = PART_TYPES.get(kind) if isinstance(kind, str) else None
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
            f"a part of type {kind} needs a field {kind}, and no other that holds it; got {describe_value(part)}"
        )
    return {"type": media, media: _address(part[names[0]]), **{name: part[name] for name in own}}


def _address(value: Any) -> Any:
    """`{"url": ..}` and `{"data": ..}` -> what they hold; anything else stays for the next step to judge."""
    if not isinstance(value, Mapping):
        return value
    value = without_nulls(value)
    refuse_unknown(value, {"url", "data", "detail", "format"})
    return value.get("url", value.get("data"))


def _role_and_content(message: Any) -> tuple[Any, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"messages: got {describe_value(message)}; allowed: objects with role and content")
    refuse_unknown(without_nulls(message), {"role", "content", "name"})
    return message.get("role"), message.get("content")


def _plain_text(content: Any) -> str:
    """Text of a message that may hold nothing else."""
    parts = parts_from_content("" if content is None else content)
    if any(part["type"] != "text" or not isinstance(part["text"], str) for part in parts):
        raise InvalidRequest(f"messages: got {describe_value(content)} in a system or assistant message; allowed: text")
    return "".join(part["text"] for part in parts)
