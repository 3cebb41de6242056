"""Bodies that are small for their cost: each is refused before it costs time or memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from pydantic import BaseModel, ValidationError

from embedder.errors import InvalidRequest
from embedder.http.dialects import kserve
from embedder.http.dialects.detokenize import DecodeRequest, DetokenizeRequest
from embedder.http.request_body import MAX_SURROGATE_BYTES, read_json, validate_body
from embedder.http.routes import EXAMPLES
from embedder.settings import Settings
from tests.conftest import slow_except


def test_large_body_with_a_lone_surrogate_is_not_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        read_json(b'{"a": "\\ud800' + b"\\n" * MAX_SURROGATE_BYTES + b'"}')


@pytest.mark.parametrize(
    "shape", [[0], [2], [-1, -1], [2**63 - 1] * 50, [2**32, 2**32, 1], [10**300] * 3, [0, 10**300]], ids=range(7)
)
def test_shape_of_other_values_is_refused_however_large_its_numbers_are(shape: list[int]) -> None:
    """The product of 1000 numbers of 4000 digits takes a minute. 2**64 values are not 0, and (2**63 - 1)**50 not 1."""
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "data": ["a"], "shape": shape}]}
    with pytest.raises(InvalidRequest):
        kserve.parse_infer(body, Settings())


def test_number_beyond_64_bits_is_a_float_also_next_to_a_lone_surrogate() -> None:
    for number in ("99999999999999999999", "-9223372036854775809", "1" * 300):
        assert read_json(f'{{"a": {number}, "b": "\\ud800"}}'.encode())["a"] == orjson.loads(number) == float(number)
    for number in ("1" * 400, "9" * 5000, "1e999", "-1e999"):
        with pytest.raises(InvalidRequest, match="not valid JSON"):
            read_json(f'{{"a": {number}, "b": "\\ud800"}}'.encode())
    assert read_json(b'{"a": 18446744073709551615, "b": "\\ud800"}')["a"] == 2**64 - 1


def with_surrogates(value: Any) -> Iterator[Any]:
    """The value with a lone surrogate in the place of one string, or in one name, for each of them."""
    if isinstance(value, str):
        yield "\ud800"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield {**value, f"{name}\ud800": inner}
            yield from ({**value, name: changed} for changed in with_surrogates(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from ([*value[:index], changed, *value[index + 1 :]] for changed in with_surrogates(inner))


@pytest.mark.parametrize("path", slow_except(EXAMPLES, kserve.INFER.path))
def test_lone_surrogate_anywhere_is_no_bug_of_the_service(path: str, client: httpx.Client) -> None:
    """A response cannot repeat it, because it is not Unicode text."""
    for body in EXAMPLES[path].values():
        for changed in (*with_surrogates(body), {**body, "id": "\ud800"}, {**body, "user": "\ud800"}):
            headers = {"content-type": "application/json"}
            assert client.post(path, content=json.dumps(changed), headers=headers).status_code != 500, changed


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (DecodeRequest, {"ids": ["a"] * 1000}),
        (DecodeRequest, {"ids": [["a"] * 10] * 100}),
        (DetokenizeRequest, {"tokens": ["a"] * 1000}),
    ],
    ids=range(3),
)
def test_faults_of_a_body_are_explained_up_to_a_limit(model: type[BaseModel], fields: dict[str, Any]) -> None:
    """Explaining 50,000 of them is one call of pydantic that holds the GIL for 0.2 s."""
    with pytest.raises(InvalidRequest, match=r"\[0\]: got 'a'") as caught:
        validate_body(model, fields)
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() < 5


def test_very_many_unknown_fields_are_refused_without_explaining_each() -> None:
    with pytest.raises(InvalidRequest, match="unknown fields: k0, k1, k2, k3, k4 and 995 more") as caught:
        validate_body(DecodeRequest, {f"k{number}": 1 for number in range(1000)} | {"ids": [1]})
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"inputs": "a" * 200_001}, 400, "text of 200001 characters; allowed: up to 200000"),
        ({"inputs": ["a", "a" * 200_001]}, 400, "text of 200001 characters"),
        ({"prompt": "a" * 200_001}, 400, "text of 200001 characters"),
        ({"items": ["a" * 200_001]}, 400, "text of 200001 characters"),
        ({"messages": [{"role": "user", "content": "a" * 200_001}]}, 400, "text of 200001 characters"),
        ({"inputs": [" \n" * 20_000] * 4}, 413, "allowed: up to 65536 in one request"),
        ({"prompt": " \n" * 70_000}, 413, "allowed: up to 65536 in one request"),
        ({"inputs": ["a" * 190_000] * 12}, 413, "the texts have 2280000 characters; allowed: 2097152 in one request"),
        ({"items": ["a" * 190_000] * 12}, 413, "the texts have 2280000 characters; allowed: 2097152 in one request"),
    ],
    ids=range(9),
)
def test_tokens_of_a_text_are_counted_up_to_a_limit(
    body: dict[str, Any], status: int, message: str, client: httpx.Client
) -> None:
    """64 MB of text would be 25 GB of tokens."""
    response = client.post("/tokenize", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert client.post("/tokenize", json={"inputs": ["red", ""]}).status_code == 200
