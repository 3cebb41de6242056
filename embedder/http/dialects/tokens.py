"""Counting and showing tokens: `POST /tokenize`, `/detokenize` and `/decode`.

The body's field decides the contract of `/tokenize`: `items` is this service's own, and counts the tokens of items of
any kind as an embedding request would, without decoding a picture; `prompt` and `messages` are vLLM's, `inputs` is
TEI's. Each is handled in a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, RootModel, StrictBool, StrictInt

from embedder.engine.admission import check_num_chars
from embedder.errors import DeadlineExceeded, InvalidRequest, attributed_to_item
from embedder.http.dialects.embed import parse_embed
from embedder.http.dialects.messages import item_from_conversation, item_from_string
from embedder.http.request_body import NonEmptyList, RequestBody, check_item_count, validate_body
from embedder.inputs.address import has_url
from embedder.inputs.items import EmbeddingItem, Text, item_from_fields
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.tokens import check_num_shown, item_ids, text_of, text_tokens, token_strings
from embedder.settings import Settings

MAX_IDS = 50_000  # of a request
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]


@dataclass(frozen=True)
class TokenRoute:
    """A route that answers from the tokenizer alone. `handle` gives the fields of the response."""

    path: str
    summary: str
    request: type[BaseModel]
    response: type[BaseModel]
    handle: Callable[[Mapping[str, Any], Preprocessor, Settings], Any]
    examples: Mapping[str, Any]


class TokenizeRequest(RequestBody):
    """Body of `POST /tokenize`: one of `items`, `prompt`, `messages` and `inputs`."""

    items: list[Any] | None = Field(None, description="Items as in `POST /embed`.")
    prompt: str | None = Field(None, description="vLLM's: a text.")
    messages: Any = Field(None, description="vLLM's: a conversation.")
    inputs: str | NonEmptyList[str] | None = Field(None, description="TEI's: texts.")
    instruction: str | None = Field(None, description="The task, for `items` without one.")
    return_token_strs: StrictBool = Field(False, description="vLLM's: the tokens as strings too.")
    prompt_name: Any = Field(None, description="TEI's; no effect on the tokens of the text.")


class TokenizeResponse(RootModel[Any]):
    """`counts` for items; `tokens` and `count` for vLLM's clients; lists of tokens for TEI's."""


class DetokenizeRequest(RequestBody):
    """Body of vLLM's `POST /detokenize`."""

    tokens: Ids = Field(description="Token ids.")


class DetokenizeResponse(BaseModel):
    """Response of `POST /detokenize`."""

    prompt: str


class DecodeRequest(RequestBody):
    """Body of TEI's `POST /decode`."""

    ids: Ids | Annotated[list[Ids], Field(fail_fast=True)] = Field(description="Token ids of one text, or of several.")
    skip_special_tokens: StrictBool = True


class DecodeResponse(RootModel[list[str]]):
    """Response of `POST /decode`: the texts."""


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
    messages = request.messages
    fields = item_from_string(request.prompt) if request.prompt is not None else item_from_conversation(messages)
    item = item_from_fields({"instruction": request.instruction, **fields})
    check_num_chars(item, settings)
    ids = item_ids(item, preprocessor)
    check_num_shown(len(ids))
    strings = {"token_strs": token_strings(ids, preprocessor)} if request.return_token_strs else {}
    return {"count": len(ids), "max_model_len": settings.max_input_tokens, "tokens": ids, **strings}


def _show_texts(texts: list[str], preprocessor: Preprocessor, settings: Settings) -> list[Any]:
    check_item_count(len(texts), settings)
    shown: list[Any] = []
    num_tokens, deadline = 0, time.monotonic() + settings.request_timeout_s
    for index, text in enumerate(texts):
        with attributed_to_item(index):
            check_num_chars(EmbeddingItem((Text(text or " "),)), settings)
        shown.append(text_tokens(text, preprocessor, num_tokens))
        num_tokens += len(shown[-1])
        _check_deadline(deadline, settings)
    return shown


def _check_deadline(deadline: float, settings: Settings) -> None:
    if time.monotonic() > deadline:
        raise DeadlineExceeded(f"timeout: not done after {settings.request_timeout_s:g} s")


def _count_items(request: TokenizeRequest, preprocessor: Preprocessor, settings: Settings) -> dict[str, Any]:
    """The tokens of each item before it is cut. The first item that is not valid fails the request."""
    counts = []
    deadline = time.monotonic() + settings.request_timeout_s
    fields = {"items": request.items, "instruction": request.instruction}
    for index, item in enumerate(parse_embed(fields, settings).items):
        with attributed_to_item(index):
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


def detokenize(body: Mapping[str, Any], preprocessor: Preprocessor, _: Settings) -> Any:
    """Body of `/detokenize` -> response. Raises `InvalidRequest`."""
    request = validate_body(DetokenizeRequest, body)
    return {"prompt": text_of(_check_ids(request.tokens), preprocessor, skip_special_tokens=False)}


def decode(body: Mapping[str, Any], preprocessor: Preprocessor, _: Settings) -> Any:
    """Body of `/decode` -> response. Raises `InvalidRequest`."""
    request = validate_body(DecodeRequest, body)
    lists = [ids for ids in request.ids if isinstance(ids, list)] or [
        [one for one in request.ids if isinstance(one, int)]
    ]
    return [text_of(_check_ids(ids), preprocessor, skip_special_tokens=request.skip_special_tokens) for ids in lists]


def _check_ids(ids: list[int]) -> list[int]:
    if len(ids) > MAX_IDS or any(not 0 <= one < 2**31 for one in ids):
        raise InvalidRequest(f"token ids: allowed: up to {MAX_IDS} numbers from 0 to 2**31 - 1")
    return ids


ROUTES = (
    TokenRoute(
        "/tokenize",
        "Count or show the tokens of items and texts",
        TokenizeRequest,
        TokenizeResponse,
        tokenize,
        {"items": {"items": ["red"]}, "vLLM: prompt": {"prompt": "red"}, "TEI: texts": {"inputs": ["red"]}},
    ),
    TokenRoute(
        "/detokenize",
        "Token ids to text, in the format of vLLM's clients",
        DetokenizeRequest,
        DetokenizeResponse,
        detokenize,
        {"ids": {"tokens": [0, 1]}},
    ),
    TokenRoute(
        "/decode",
        "Token ids to texts, in the format of TEI's clients",
        DecodeRequest,
        DecodeResponse,
        decode,
        {"ids": {"ids": [[0, 1]]}},
    ),
)
