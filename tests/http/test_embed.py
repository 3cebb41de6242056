"""Each entry of `/embed` becomes an item or an error, and the response has a result for each."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from embedder.engine.postprocess import Embedding
from embedder.errors import EngineFailed, InvalidMedia, InvalidRequest, RequestTooLarge
from embedder.http.dialects.dialect import ServedModel
from embedder.http.dialects.embed import EmbedItemsRequest, EmbedResponse, embed_response, parse_embed
from embedder.http.response import error_body
from embedder.inputs.items import EmbeddingItem, Image, Text
from embedder.settings import Settings

SETTINGS = Settings(max_items_per_request=4)
VECTOR = np.array([1.0, -2.0], np.float32)


def parse(*items: Any, **options: Any) -> EmbedItemsRequest:
    return parse_embed({"items": list(items), **options}, SETTINGS)


def answer(request: EmbedItemsRequest, *outcomes: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(embed_response(request, outcomes, ServedModel("the model", 100)))
    EmbedResponse.model_validate(body)
    return body


def test_error_of_an_entry_keeps_no_frames() -> None:
    """Frames hold the body, and in a reference cycle only the garbage collector would free it."""
    (failed,) = parse({"text": 5}).items
    assert isinstance(failed, InvalidRequest)
    assert (failed.__traceback__, failed.__cause__, failed.__context__) == (None, None, None)


def test_string_object_and_mixture_are_items() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": "AAAA"}]
    request = parse("red", {"image": "AAAA"}, {"content": content})
    assert [item.parts for item in request.items if isinstance(item, EmbeddingItem)] == [
        (Text("red"),),
        (Image("AAAA"),),
        (Text("a"), Image("AAAA")),
    ]


def test_options_of_the_request_apply_to_items_without_their_own() -> None:
    own = {"text": "b", "instruction": "Mine.", "dimensions": 128, "normalize": True, "truncate": "none"}
    request = parse("a", own, instruction="Find.", dimensions=64, normalize=False, truncate="start")
    assert request.items == (
        EmbeddingItem((Text("a"),), "Find.", 64, normalize=False, truncate="start"),
        EmbeddingItem((Text("b"),), "Mine.", 128, normalize=True, truncate="none"),
    )


def test_invalid_entry_becomes_an_error_at_its_index() -> None:
    request = parse("a", 5, {"txt": "b"}, "c")
    assert [isinstance(item, InvalidRequest) for item in request.items] == [False, True, True, False]
    assert str(request.items[1]) == "got 5 (a number); allowed: a text, or an object with text, image or content"
    assert str(request.items[2]) == "unknown field: txt (did you mean text?)"


def test_names_of_items_are_strings_or_whole_numbers() -> None:
    request = parse({"text": "a", "id": "x"}, {"text": "b", "id": 7}, "c", {"text": 5, "id": "bad"})
    assert request.ids == ("x", 7, None, "bad")
    wrong = parse({"text": "a", "id": True}, {"text": "a", "id": [1]})
    assert wrong.ids == (None, None)
    assert str(wrong.items[0]) == "id: got true (a boolean); allowed: a string or a whole number"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "items: missing"),
        ({"items": []}, "items: got an empty list; allowed: at least one item"),
        ({"items": "red"}, "items: got 'red' (a string); input should be a valid list"),
        ({"items": ["a"], "instrction": "b"}, "unknown field: instrction"),
        ({"items": ["a"], "output_dtype": "int4"}, "output_dtype: got 'int4' (a string); input should be 'float32', "),
    ],
)
def test_invalid_body_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_embed(body, SETTINGS)
    assert str(caught.value).startswith(message)


def test_too_many_items_are_refused() -> None:
    with pytest.raises(RequestTooLarge, match="got 5 items; allowed: 1 to 4"):
        parse(*"abcde")


def test_int8_needs_normalized_vectors() -> None:
    request = parse("a", {"text": "b", "normalize": False}, output_dtype="int8")
    assert isinstance(request.items[0], EmbeddingItem)
    assert "allowed: with normalize true" in str(request.items[1])


def test_response_has_a_result_for_each_item() -> None:
    request = parse({"text": "a", "id": "x"}, "b", {"text": "c", "id": "z"})
    body = answer(request, Embedding(VECTOR, 5, 0), InvalidMedia("no picture", item=1), Embedding(VECTOR, 100, 3))
    assert body == {
        "results": [
            {"index": 0, "id": "x", "embedding": [1.0, -2.0]},
            {"index": 1, "error": {"code": "invalid_media", "message": "no picture"}},
            {"index": 2, "id": "z", "embedding": [1.0, -2.0]},
        ],
        "model": "the model",
        "usage": {"prompt_tokens": 105, "total_tokens": 105},
        "warnings": ["item 2: got 103 tokens; allowed: 100; its text was cut by 3 tokens"],
    }


def test_vectors_have_the_requested_encoding_and_type() -> None:
    body = answer(parse("a", encoding_format="base64"), Embedding(VECTOR, 5, 0))
    assert np.array_equal(np.frombuffer(base64.b64decode(body["results"][0]["embedding"]), "<f4"), VECTOR)
    assert answer(parse("a", output_dtype="ubinary"), Embedding(VECTOR, 5, 0))["results"][0]["embedding"] == [128]


def test_request_without_any_vector_raises_its_first_error() -> None:
    bad, failed, good = InvalidMedia("no picture"), EngineFailed("failed"), Embedding(VECTOR, 5, 0)
    assert "error" not in answer(parse("a", "b"), bad, good)
    assert "error" not in answer(parse("a", "b"), good, bad)
    with pytest.raises(InvalidMedia) as caught:
        answer(parse("a", "b"), bad, failed)
    assert caught.value is bad
    body = json.loads(error_body(bad))
    assert next(iter(body)) == "error"  # where every other error has it
    assert body["error"]["code"] == "invalid_media"
    assert [result["error"]["code"] for result in body["results"]] == ["invalid_media", "engine_failed"]
