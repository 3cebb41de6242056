"""Vectors and usage -> JSON bytes; errors -> the one error body.

Vectors are written by orjson straight from numpy: 0.06 ms for 2048 values against 1.5..2.4 ms through BentoML's own
serialization (2-core CPU, BentoML 1.4.39, 2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pybase64
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from embedder.engine.postprocess import Embedding
from embedder.errors import (
    DeadlineExceeded,
    EmbedderError,
    InvalidRequest,
    MediaUnavailable,
    Overloaded,
    ShuttingDown,
)
from embedder.http.request_body import EncodingFormat

Vector = list[float] | str


class Usage(BaseModel):
    """Tokens that were embedded, instruction and template included."""

    prompt_tokens: int
    total_tokens: int


class ErrorBody(BaseModel):
    """What went wrong, and where."""

    code: str
    message: str = Field(description="What was got, what is allowed, and which item.")
    item: int | None = Field(description="Index of the item in the request, if one is at fault.")
    type: str


class ErrorResponse(BaseModel):
    """Body of every answer that is not 200."""

    error: ErrorBody


def encode_vector(vector: NDArray[Any], encoding_format: EncodingFormat) -> Any:
    """One vector as the request wants it written."""
    return to_base64(vector) if encoding_format == "base64" else vector


def usage_fields(embeddings: Mapping[int, Embedding], limit: int) -> dict[str, Any]:
    """`usage`, and `warnings` where text was cut, of what was embedded, by its index in the request."""
    num_tokens = sum(one.num_tokens for one in embeddings.values())
    fields: dict[str, Any] = {"usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}
    cut = {index: one for index, one in embeddings.items() if one.num_cut_tokens}
    if cut:
        fields["warnings"] = [
            f"item {index}: got {one.num_tokens + one.num_cut_tokens} tokens; allowed: {limit}; "
            f"{one.num_cut_tokens} of the text were cut"
            for index, one in cut.items()
        ]
    return fields


def error_body(error: EmbedderError) -> bytes:
    """The body of an answer that is not 200."""
    return to_json(error_fields(error))


def error_fields(error: EmbedderError) -> dict[str, Any]:
    """The same, not yet JSON."""
    return {"error": {"code": error.code, "message": str(error), "item": error.item, "type": _error_type(error)}}


def to_base64(vector: NDArray[Any]) -> str:
    """The values' bytes in base64, little-endian: float32 for a vector as embedded, else as it was quantized."""
    return pybase64.b64encode(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")


def to_json(fields: Any) -> bytes:
    """JSON bytes; numpy arrays become lists."""
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def _error_type(error: EmbedderError) -> str:
    if isinstance(error, InvalidRequest):
        return "invalid_request"
    is_unavailable = isinstance(error, MediaUnavailable | Overloaded | DeadlineExceeded | ShuttingDown)
    return "unavailable" if is_unavailable else "server_error"
