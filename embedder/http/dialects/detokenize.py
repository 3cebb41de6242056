"""Token ids to text: vLLM's `POST /detokenize` and TEI's `POST /decode`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, RootModel, StrictBool, StrictInt

from embedder.errors import InvalidRequest
from embedder.http.dialects.dialect import TokenRoute
from embedder.http.request_body import RequestBody, validate_body
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.tokens import text_of
from embedder.settings import Settings

MAX_IDS = 50_000  # of a request
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]


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


TO_TEXT = (
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
