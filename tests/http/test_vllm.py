"""vLLM's number types and bodies of bytes hold the vectors of the same request as floats."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embedder.engine.postprocess import OutputDtype
from embedder.errors import InvalidRequest
from embedder.http.dialects.openai import parse_embeddings
from embedder.http.wire_types import EmbedDtype, Endianness, float8_magnitudes, vector_bytes
from embedder.settings import Settings

TYPES = {  # torch's type, and the largest error relative to a value: half a step of its mantissa
    "float32": (torch.float32, 0.0),
    "float16": (torch.float16, 2**-11),
    "bfloat16": (torch.bfloat16, 2**-8),
    "fp8_e4m3": (torch.float8_e4m3fn, 2**-4),
    "fp8_e5m2": (torch.float8_e5m2, 2**-3),
}
SMALLEST = {"float16": 2**-25, "fp8_e4m3": 2**-10, "fp8_e5m2": 2**-17}  # half a step around 0, absolute
TEXTS = ["red", "green and blue"]


def decode(data: bytes, embed_dtype: str, endianness: str) -> NDArray[np.float32]:
    """The values, read by torch."""
    kind = TYPES[embed_dtype][0]
    if endianness == "big":
        data = np.frombuffer(data, f">u{kind.itemsize}").astype(f"<u{kind.itemsize}").tobytes()
    values: NDArray[np.float32] = torch.frombuffer(bytearray(data), dtype=kind).float().numpy()
    return values


def assert_within_precision(values: Any, expected: Any, embed_dtype: str) -> None:
    allowed = np.maximum(np.abs(expected) * TYPES[embed_dtype][1], SMALLEST.get(embed_dtype, 0)) + 1e-6
    assert (np.abs(values - expected) <= allowed).all()


@pytest.mark.parametrize("endianness", get_args(Endianness))
@pytest.mark.parametrize("embed_dtype", get_args(EmbedDtype))
def test_bytes_are_those_of_torch(embed_dtype: EmbedDtype, endianness: Endianness) -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(size=4000), 10 ** generator.uniform(-9, 0, 4000), [0, -0.0, 1, -1]])
    vector = values.astype(np.float32)
    expected = torch.from_numpy(vector).to(TYPES[embed_dtype][0]).float().numpy()
    got = decode(vector_bytes(vector, embed_dtype, endianness), embed_dtype, endianness)
    assert np.array_equal(got, expected)
    assert np.array_equal(np.signbit(got), np.signbit(expected))
    assert_within_precision(got, vector, embed_dtype)


@pytest.mark.parametrize("embed_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_values_half_way_are_rounded_to_even_and_large_ones_saturate(embed_dtype: Any) -> None:
    magnitudes = float8_magnitudes(embed_dtype)
    half_way = (magnitudes[:-1] + magnitudes[1:]) / 2
    for sign in (1, -1):
        got = np.frombuffer(vector_bytes(sign * half_way, embed_dtype, "native"), np.uint8) & 127
        assert np.array_equal(got, (np.arange(len(half_way)) + 1) // 2 * 2)
        beyond = decode(vector_bytes(np.array([sign * 1e9], np.float32), embed_dtype, "native"), embed_dtype, "little")
        assert beyond == sign * magnitudes[-1]


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def floats(http: httpx.Client) -> Any:
    data = http.post("/v1/embeddings", json={"input": TEXTS}).json()["data"]
    return np.array([one["embedding"] for one in data], np.float32)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/embeddings", "/invocations"])
@pytest.mark.parametrize("embed_dtype", get_args(EmbedDtype))
def test_every_encoding_holds_the_same_vectors(embed_dtype: str, path: str, http: httpx.Client, floats: Any) -> None:
    for endianness in get_args(Endianness):
        for encoding in ("base64", "bytes", "bytes_only"):
            body = {"input": TEXTS, "encoding_format": encoding, "embed_dtype": embed_dtype, "endianness": endianness}
            answer = http.post(path, json=body)
            parts = _parts(answer, encoding, len(floats[0]) * TYPES[embed_dtype][0].itemsize)
            values = np.stack([decode(part, embed_dtype, endianness) for part in parts])
            assert_within_precision(values, floats, embed_dtype)
            assert ("metadata" in answer.headers) == (encoding == "bytes")


def _parts(answer: httpx.Response, encoding: str, num_bytes: int) -> list[bytes]:
    """Each vector's bytes, where the response says that they are."""
    if encoding == "base64":
        return [base64.b64decode(one.get("embedding", one.get("data"))) for one in answer.json()["data"]]
    assert answer.headers["content-type"] == "application/octet-stream"
    if encoding == "bytes_only":
        return [answer.content[start : start + num_bytes] for start in range(0, len(answer.content), num_bytes)]
    metadata = json.loads(answer.headers["metadata"])
    assert set(metadata) == {"id", "created", "model", "usage", "data"}
    assert [one["index"] for one in metadata["data"]] == [0, 1]
    return [answer.content[one["start"] : one["end"]] for one in metadata["data"]]


@pytest.mark.parametrize("encoding", ["bytes", "bytes_only"])
def test_number_types_that_the_header_cannot_name_are_refused_as_bytes(encoding: str) -> None:
    body = {"input": "red", "encoding_format": encoding}
    for output_dtype in set(get_args(OutputDtype)) - {"float32"}:
        with pytest.raises(InvalidRequest, match=f"output_dtype: got {output_dtype} with encoding_format {encoding}; "):
            parse_embeddings({**body, "output_dtype": output_dtype}, Settings())
    assert parse_embeddings({**body, "output_dtype": "float32"}, Settings()).encoding.is_bytes


@pytest.mark.parametrize("name", ["encoding_format", "embed_dtype", "endianness"])
def test_unknown_number_type_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: got 'bad' "):
        parse_embeddings({"input": "red", name: "bad"}, Settings())


def test_prompt_cannot_be_continued_and_answered_at_once() -> None:
    fields = {"messages": [{"role": "user", "content": "red"}], "add_generation_prompt": True}
    parse_embeddings({**fields, "continue_final_message": False}, Settings())
    with pytest.raises(InvalidRequest, match=r"add_generation_prompt and continue_final_message: got true for both"):
        parse_embeddings({**fields, "continue_final_message": True}, Settings())
