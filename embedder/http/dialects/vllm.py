"""What vLLM's clients send in addition to OpenAI's fields: number types, bytes, conversations, limits on tokens.

`embed_dtype` and `endianness` apply to `base64`, `bytes` and `bytes_only`, as in vLLM. `bytes` describes the vectors in
the header `metadata`; `bytes_only` has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pybase64
from numpy.typing import NDArray
from pydantic import Field, StrictBool, StrictInt
from starlette.responses import Response

from embedder.engine.postprocess import Embedding, OutputDtype, quantize, to_base64
from embedder.errors import InvalidRequest
from embedder.http.dialects.messages import text_limit
from embedder.http.request_body import EncodingFormat, Options
from embedder.http.wire_types import EmbedDtype, Endianness, vector_bytes
from embedder.inputs.items import EmbeddingItem, check_fps, describe_value, refuse_unknown
from embedder.settings import Settings

WireFormat = Literal["float", "base64", "bytes", "bytes_only"]


@dataclass(frozen=True)
class Encoding:
    """How a response carries its vectors. `embed_dtype` float32 leaves the type to `output_dtype`."""

    wire_format: WireFormat = "float"
    output_dtype: OutputDtype = "float32"
    embed_dtype: EmbedDtype = "float32"
    endianness: Endianness = "native"

    @property
    def is_bytes(self) -> bool:
        return self.wire_format in ("bytes", "bytes_only")

    @property
    def is_own(self) -> bool:
        """Whether `embed_dtype` or `endianness` decide the bytes, and not `output_dtype`."""
        return self.embed_dtype != "float32" or self.endianness == "big"


@dataclass(frozen=True)
class EncodedRequest:
    """A request body as items, and how the response carries their vectors."""

    items: tuple[EmbeddingItem, ...]
    encoding: Encoding


class VllmOptions(Options):
    """vLLM's options of `/v1/embeddings`."""

    encoding_format: WireFormat = Field("float", description="`bytes`: the vectors' bytes, described in a header.")  # type: ignore[assignment]
    embed_dtype: EmbedDtype = Field("float32", description="Number type of base64 and bytes.")
    endianness: Endianness = Field("native", description="Byte order of base64 and bytes; native is little.")
    use_activation: StrictBool | None = Field(None, description="False: do not normalize.")
    truncate_prompt_tokens: StrictInt | None = Field(None, description="Tokens of text that are kept; -1: all.")
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which end is cut; default: right.")
    add_generation_prompt: StrictBool | None = Field(None, description="No effect: the prompt always ends so.")
    continue_final_message: StrictBool | None = Field(None, description="No effect: an empty last message is ignored.")
    mm_processor_kwargs: dict[str, Any] | None = Field(None, description="Only `fps`, of videos.")

    def vllm_item_options(self, settings: Settings) -> dict[str, Any]:
        """The options of items that these fields set. Raises `InvalidRequest`."""
        tokens = self.truncate_prompt_tokens
        if tokens is not None and tokens > settings.max_input_tokens:
            raise InvalidRequest(
                f"truncate_prompt_tokens: got {tokens}; allowed: -1, or from 1 to {settings.max_input_tokens}"
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest("add_generation_prompt and continue_final_message: got true for both; allowed: one")
        refuse_unknown(self.mm_processor_kwargs or {}, {"fps"})
        check_fps((self.mm_processor_kwargs or {}).get("fps"))
        options: dict[str, Any] = {"max_text_tokens": text_limit("truncate_prompt_tokens", tokens, settings)}
        if self.use_activation is not None:
            options["normalize"] = self.use_activation
        if self.truncation_side is not None:
            options["truncate"] = "start" if self.truncation_side == "left" else "end"
        return options

    def with_fps(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The item with the request's sampling rate, where it has a video without its own."""
        fps = (self.mm_processor_kwargs or {}).get("fps")
        if fps is None:
            return fields
        if "video" in fields:
            return {"fps": fps, **fields}
        if "content" in fields:
            parts = [{"fps": fps, **part} if part["type"] == "video" else part for part in fields["content"]]
            return {**fields, "content": parts}
        return fields

    def encoding(self, encoding_format: EncodingFormat | None, output_dtype: OutputDtype | None) -> Encoding:
        """The encoding, with the format and the type that synonyms of the fields ask for, if any.

        Raises `InvalidRequest`.
        """
        encoding = Encoding(
            encoding_format or self.encoding_format,
            output_dtype or self.output_dtype,
            self.embed_dtype,
            self.endianness,
        )
        if encoding.is_bytes and encoding.output_dtype != "float32":  # the header knows vLLM's number types only
            raise InvalidRequest(
                f"output_dtype: got {encoding.output_dtype} with encoding_format {encoding.wire_format}; "
                "allowed: float32, and `embed_dtype` for other types"
            )
        return encoding


def encoded_vector(vector: NDArray[np.float32], encoding: Encoding) -> Any:
    """A vector in a JSON body."""
    if encoding.wire_format == "float":
        return quantize(vector, encoding.output_dtype)
    if encoding.is_own:
        return pybase64.b64encode(_bytes(vector, encoding)).decode("ascii")
    return to_base64(quantize(vector, encoding.output_dtype))


def bytes_response(request: EncodedRequest, embeddings: Sequence[Embedding], about: Mapping[str, Any]) -> Response:
    """All vectors as one body of bytes, and in the header `metadata` where each begins and ends."""
    encoding = request.encoding
    parts = [_bytes(one.vector, encoding) for one in embeddings]
    data, start = [], 0
    for index, (part, one) in enumerate(zip(parts, embeddings, strict=True)):
        place = {"start": start, "end": start + len(part), "shape": [len(one.vector)]}
        data.append({"index": index, "embed_dtype": encoding.embed_dtype, "endianness": encoding.endianness, **place})
        start += len(part)
    metadata = {name: about[name] for name in ("id", "created", "model", "usage")} | {"data": data}
    headers = {"metadata": json.dumps(metadata)} if encoding.wire_format == "bytes" else None
    return Response(b"".join(parts), headers=headers, media_type="application/octet-stream")


def _bytes(vector: NDArray[np.float32], encoding: Encoding) -> bytes:
    return vector_bytes(vector, encoding.embed_dtype, encoding.endianness)


def conversations(messages: Any) -> Sequence[Any]:
    """One conversation, as vLLM's clients send it, or several, as mteb's does."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"messages: got {describe_value(messages)}; allowed: a list of at least one message")
    return messages if isinstance(messages[0], list) else [messages]
