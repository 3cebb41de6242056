"""Responses have the shape of the input; all errors have one form."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.engine.postprocess import Embedding, to_base64
from embedder.errors import (
    DeadlineExceeded,
    EmbedderError,
    EngineFailed,
    InvalidMedia,
    InvalidRequest,
    MediaTooLarge,
    MediaUnavailable,
    ModelUnavailable,
    Overloaded,
    ShuttingDown,
)
from embedder.http.dialects.dialect import ServedModel
from embedder.http.dialects.local import EmbeddingResponse, embedding_response
from embedder.http.request_body import EmbeddingRequest, EncodingFormat
from embedder.http.response import ErrorResponse, error_body, to_json
from embedder.inputs.items import EmbeddingItem, Text

VECTORS = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


def floats(vector: NDArray[np.float32]) -> list[float]:
    """As JSON has them: the shortest decimals that name the same float32."""
    return [float(str(value)) for value in vector]


def embedding(index: int = 0, num_tokens: int = 20, num_cut_tokens: int = 0) -> Embedding:
    return Embedding(VECTORS[index], num_tokens, num_cut_tokens)


def answer(
    *embeddings: Embedding, is_list: bool = True, encoding_format: EncodingFormat = "float", limit: int = 100
) -> dict[str, Any]:
    items = (EmbeddingItem((Text("a"),)),) * len(embeddings)
    request = EmbeddingRequest(items, is_list, encoding_format)
    body: dict[str, Any] = json.loads(embedding_response(request, embeddings, ServedModel("the model", limit)))
    EmbeddingResponse.model_validate(body, strict=True)
    return body


def test_single_input_gives_one_vector() -> None:
    assert answer(embedding(), is_list=False) == {
        "embedding": floats(VECTORS[0]),
        "model": "the model",
        "dimensions": 64,
        "usage": {"prompt_tokens": 20, "total_tokens": 20},
    }


def test_list_of_one_or_more_gives_a_list_in_order() -> None:
    assert answer(embedding(1))["embedding"] == [floats(VECTORS[1])]
    assert answer(embedding(2), embedding(0))["embedding"] == [floats(VECTORS[2]), floats(VECTORS[0])]


def test_floats_in_the_response_are_bit_identical() -> None:
    tricky = np.array([0.1, 1 / 3, 1e-38, -0.0, 3.4e38, np.float32(2) ** -149], np.float32)
    sent = answer(Embedding(tricky, 1, 0), is_list=False)["embedding"]
    assert np.array_equal(np.array(sent, np.float32).view(np.int32), tricky.view(np.int32))


def test_base64_holds_little_endian_float32() -> None:
    assert to_base64(np.array([1.0, -2.0], np.float32)) == "AACAPwAAAMA="  # 00 00 80 3f, 00 00 00 c0
    sent = answer(embedding(0), embedding(1), encoding_format="base64")["embedding"]
    decoded = [np.frombuffer(base64.b64decode(text), "<f4") for text in sent]
    assert np.array_equal(np.stack(decoded), VECTORS[:2])
    assert isinstance(answer(embedding(), is_list=False, encoding_format="base64")["embedding"], str)


def test_base64_does_not_depend_on_strides_or_byte_order() -> None:
    whole = VECTORS.T.copy().T  # not contiguous along a row
    assert to_base64(whole[0]) == to_base64(VECTORS[0])
    assert to_base64(VECTORS[0].astype(">f4")) == to_base64(VECTORS[0])


def test_tokens_of_all_items_are_counted() -> None:
    assert answer(embedding(num_tokens=5), embedding(num_tokens=7))["usage"] == {
        "prompt_tokens": 12,
        "total_tokens": 12,
    }


def test_warnings_name_each_item_whose_text_was_cut() -> None:
    body = answer(embedding(), embedding(num_tokens=100, num_cut_tokens=23), embedding(), limit=100)
    assert body["warnings"] == ["item 1: got 123 tokens; allowed: 100; its text was cut by 23 tokens"]
    assert "warnings" not in answer(embedding())


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (InvalidRequest("m"), "invalid_request", "invalid_request"),
        (InvalidMedia("m"), "invalid_media", "invalid_request"),
        (MediaTooLarge("m"), "media_too_large", "invalid_request"),
        (MediaUnavailable("m"), "media_unavailable", "unavailable"),
        (Overloaded("m", retry_after_s=1), "overloaded", "unavailable"),
        (ShuttingDown("m"), "shutting_down", "unavailable"),
        (DeadlineExceeded("m"), "deadline_exceeded", "unavailable"),
        (EngineFailed("m"), "engine_failed", "server_error"),
        (ModelUnavailable("m"), "model_unavailable", "server_error"),
        (EmbedderError("m"), "internal_error", "server_error"),
    ],
)
def test_every_error_has_the_same_form(error: EmbedderError, code: str, kind: str) -> None:
    body = json.loads(error_body(error))
    assert body == {"error": {"code": code, "message": "m", "item": None, "type": kind}}
    ErrorResponse.model_validate(body, strict=True)
    error.item = 2
    assert json.loads(error_body(error))["error"] == {"code": code, "message": "item 2: m", "item": 2, "type": kind}


def test_message_may_contain_any_character() -> None:
    error = InvalidRequest('got "\u732b"\n\x00\\')
    assert json.loads(error_body(error))["error"]["message"] == error.message


def test_arrays_become_lists() -> None:
    assert to_json({"a": VECTORS[0][:2]}) == b'{"a":' + to_json(floats(VECTORS[0][:2])) + b"}"
