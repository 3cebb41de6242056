"""Counting and showing tokens: `POST /tokenize`.

The body's field decides the contract: `items` is this service's own, and counts the tokens of items of any kind as an
embedding request would, without decoding a picture; `prompt` and `messages` are vLLM's, `inputs` is TEI's. The routes
of `ROUTES` are handled in a thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pydantic import Field, RootModel, StrictBool

from embedder.engine.admission import CHARS_PER_TOKEN, check_num_chars
from embedder.errors import AttributedToItem, DeadlineExceeded, InvalidRequest, RequestTooLarge
from embedder.http.dialects.detokenize import TO_TEXT
from embedder.http.dialects.dialect import TokenRoute
from embedder.http.dialects.embed import parse_embed
from embedder.http.dialects.messages import item_from_conversation, item_from_string
from embedder.http.request_body import NonEmptyList, RequestBody, check_item_count, validate_body
from embedder.inputs.address import has_url
from embedder.inputs.items import EmbeddingItem, Text, item_from_fields
from embedder.inputs.preprocess import Preprocessor, num_chars
from embedder.inputs.tokens import check_num_shown, item_ids, text_tokens, token_strings
from embedder.settings import Settings


class TokenizeRequest(RequestBody):
    """Body of `POST /tokenize`: one of `items`, `prompt`, `messages` and `inputs`."""

    items: list[Any] | None = Field(None, description="Items as in `POST /embed`.")
    prompt: str | None = Field(None, description="vLLM's: a text.")
    messages: Any = Field(None, description="vLLM's: a conversation.")
    inputs: str | NonEmptyList[str] | None = Field(None, description="TEI's: texts.")
    instruction: str | None = Field(None, description="The task, for `items` without one.")
    add_special_tokens: StrictBool = Field(
        True,
        description="vLLM's, of a `prompt`; false: the tokens of the text by itself, without template.",
    )
    return_token_strs: StrictBool = Field(False, description="vLLM's: the tokens as strings too.")
    prompt_name: Any = Field(None, description="TEI's; no effect on the tokens of the text.")


class TokenizeResponse(RootModel[Any]):
    """`counts` for items; `tokens` and `count` for vLLM's clients; lists of tokens for TEI's."""


def tokenize(body: Mapping[str, Any], preprocessor: Preprocessor, settings: Settings) -> Any:
    """Body of `/tokenize` -> response. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(TokenizeRequest, body)
    given = [name for name in ("items", "prompt", "messages", "inputs") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"give one of `items`, `prompt`, `messages` and `inputs`; got {' and '.join(given) or 'none'}"
        )
    match given[0]:
        case "items":
            return _count_items(request, preprocessor, settings)
        case "inputs":
            texts = request.inputs if isinstance(request.inputs, list) else [str(request.inputs)]
            return _show_texts(texts, preprocessor, settings)
    ids = _vllm_ids(request, preprocessor, settings)
    strings = {"token_strs": token_strings(ids, preprocessor)} if request.return_token_strs else {}
    return {"count": len(ids), "max_model_len": settings.max_input_tokens, "tokens": ids, **strings}


def _vllm_ids(request: TokenizeRequest, preprocessor: Preprocessor, settings: Settings) -> list[int]:
    prompt = request.prompt
    fields = item_from_conversation(request.messages) if prompt is None else item_from_string(prompt)
    item = item_from_fields({"instruction": request.instruction, **fields})
    check_num_chars(item, settings)
    if prompt is not None and "text" in fields and not request.add_special_tokens:
        return [token["id"] for token in text_tokens(prompt, preprocessor)]
    ids = item_ids(item, preprocessor)
    check_num_shown(len(ids))
    return ids


def _show_texts(texts: list[str], preprocessor: Preprocessor, settings: Settings) -> list[Any]:
    check_item_count(len(texts), settings)
    _check_total_chars(sum(map(len, texts)), settings)
    shown: list[Any] = []
    num_tokens, deadline = 0, time.monotonic() + settings.request_timeout_s
    for index, text in enumerate(texts):
        with AttributedToItem(index):
            check_num_chars(EmbeddingItem((Text(text or " "),)), settings)
        shown.append(text_tokens(text, preprocessor, num_tokens))
        num_tokens += len(shown[-1])
        _check_deadline(deadline, settings)
    return shown


def _check_total_chars(num_chars: int, settings: Settings) -> None:
    """Raise `RequestTooLarge` for more text than one request can have embedded."""
    allowed = CHARS_PER_TOKEN * settings.max_queued_tokens
    if num_chars > allowed:
        raise RequestTooLarge(
            f"the texts have {num_chars} characters; allowed: {allowed} in one request, which grows with "
            "EMBEDDER_MAX_QUEUED_TOKENS"
        )


def _check_deadline(deadline: float, settings: Settings) -> None:
    if time.monotonic() > deadline:
        raise DeadlineExceeded(f"timeout: not done after {settings.request_timeout_s:g} s")


def _count_items(request: TokenizeRequest, preprocessor: Preprocessor, settings: Settings) -> dict[str, Any]:
    """The tokens of each item before it is cut. The first item that is not valid fails the request."""
    counts = []
    deadline = time.monotonic() + settings.request_timeout_s
    fields = {"items": request.items, "instruction": request.instruction}
    items = parse_embed(fields, settings).items
    _check_total_chars(sum([num_chars(item) for item in items if isinstance(item, EmbeddingItem)]), settings)
    for index, item in enumerate(items):
        with AttributedToItem(index):
            if isinstance(item, InvalidRequest):
                raise item
            if has_url(item):
                raise InvalidRequest(
                    "got a URL; allowed: base64 or a data URI, because nothing is fetched to count tokens"
                )
            check_num_chars(item, settings)
            counts.append(len(item_ids(item, preprocessor)))
        _check_deadline(deadline, settings)
    return {"counts": counts, "max_input_tokens": settings.max_input_tokens}


ROUTES = (
    TokenRoute(
        "/tokenize",
        "Count or show the tokens of items and texts",
        TokenizeRequest,
        TokenizeResponse,
        tokenize,
        {"items": {"items": ["red"]}, "vLLM: prompt": {"prompt": "red"}, "TEI: texts": {"inputs": ["red"]}},
    ),
    *TO_TEXT,
)
