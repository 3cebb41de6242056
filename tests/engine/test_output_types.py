"""Quantized vectors: the error of each type is bounded, large values saturate, and vectors do not affect each other."""

from __future__ import annotations

import base64
import json
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from benchmarks import output_types
from embedder.engine.postprocess import OutputDtype, check_output_dtype, dequantize, int8_step, quantize, to_base64
from embedder.errors import InvalidRequest
from embedder.http.response import encode_vector, to_json
from tests.conftest import ROOT, finish

DTYPES: tuple[OutputDtype, ...] = get_args(OutputDtype)
DIMENSIONS = st.sampled_from([64, 65, 100, 128, 192, 768, 2048, 4096])


@st.composite
def unit_vectors(draw: st.DrawFn) -> NDArray[np.float32]:
    """Vectors of many sizes, with values of similar magnitude or with a few that dominate."""
    dimensions = draw(DIMENSIONS)
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=dimensions)
    values *= np.exp(draw(st.sampled_from([0.0, 0.5, 2.0])) * np.random.default_rng(dimensions).normal(size=dimensions))
    return finish(values.astype(np.float32), None, normalize=True)


any_vector = arrays(np.float32, DIMENSIONS, elements=st.floats(-10, 10, width=32))


def cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@given(unit_vectors())
def test_error_of_float_types_is_that_of_their_precision(vector: NDArray[np.float32]) -> None:
    assert np.array_equal(quantize(vector, "float32"), vector)
    half = quantize(vector, "float16")
    assert half.dtype == np.float16
    assert np.abs(half - vector).max() <= 2.0**-11
    assert cosine(half, vector) >= 1 - 1e-6


@given(unit_vectors())
@pytest.mark.parametrize("output_dtype", ["int8", "uint8"])
def test_error_of_integers_is_at_most_half_a_step(output_dtype: OutputDtype, vector: NDArray[np.float32]) -> None:
    step = int8_step(len(vector))
    covered = vector.clip(-127 * step, 127 * step)
    restored = dequantize(quantize(vector, output_dtype), output_dtype, len(vector))
    assert restored.dtype == np.float32
    assert np.abs(restored - covered).max() <= step / 2 * (1 + 1e-5)


@given(st.integers(0, 2**32 - 1), DIMENSIONS)
def test_integers_keep_the_cosine_of_normally_distributed_vectors(seed: int, dimensions: int) -> None:
    row = np.random.default_rng(seed).normal(size=dimensions).astype(np.float32)
    vector = finish(row, None, normalize=True)
    restored = dequantize(quantize(vector, "int8"), "int8", dimensions)
    # rounding to a step s has an error of s / sqrt(12) per value: 1 - d * s**2 / 24 = 1 - 12**2 / 127**2 / 24 = 0.99963
    assert cosine(restored, vector) >= 0.9993


@given(unit_vectors())
def test_uint8_is_int8_plus_128(vector: NDArray[np.float32]) -> None:
    signed, unsigned = quantize(vector, "int8"), quantize(vector, "uint8")
    assert (signed.dtype, unsigned.dtype) == (np.int8, np.uint8)
    assert np.array_equal(unsigned.astype(int) - 128, signed)
    assert np.array_equal(quantize(-vector, "int8"), -signed)


@given(unit_vectors())
def test_binary_types_are_the_signs_packed_from_the_highest_bit(vector: NDArray[np.float32]) -> None:
    unsigned, signed = quantize(vector, "ubinary"), quantize(vector, "binary")
    assert (unsigned.dtype, signed.dtype) == (np.uint8, np.int8)
    assert unsigned.shape == signed.shape == (math.ceil(len(vector) / 8),)
    assert np.array_equal(unsigned.astype(int) - 128, signed)
    bits = "".join("1" if value > 0 else "0" for value in vector)
    assert "".join(f"{byte:08b}" for byte in unsigned).rstrip("0") == bits.rstrip("0")
    for values, output_dtype in ((unsigned, "ubinary"), (signed, "binary")):
        assert np.array_equal(dequantize(values, output_dtype, len(vector)), np.where(vector > 0, 1, -1))  # type: ignore[arg-type]


@given(st.integers(0, 2**32 - 1), st.sampled_from([512, 2048, 4096]))
def test_cosine_of_signs_and_vector_is_that_of_a_normal_distribution(seed: int, dimensions: int) -> None:
    vector = finish(np.random.default_rng(seed).normal(size=dimensions).astype(np.float32), None, normalize=True)
    signs = dequantize(quantize(vector, "ubinary"), "ubinary", dimensions)
    assert abs(cosine(signs, vector) - math.sqrt(2 / math.pi)) < 0.1


@settings(max_examples=50)
@given(any_vector, st.sampled_from(DTYPES))
def test_values_saturate_and_never_wrap_around(vector: NDArray[np.float32], output_dtype: OutputDtype) -> None:
    values = quantize(vector, output_dtype)
    if output_dtype in ("int8", "uint8"):
        middle = 128 if output_dtype == "uint8" else 0
        steps = values.astype(int) - middle
        assert np.abs(steps).max() <= 127
        assert (steps[vector > 1] > 0).all()
        assert (steps[vector >= 127 * int8_step(len(vector))] == 127).all()
        assert (steps[vector <= -127 * int8_step(len(vector))] == -127).all()
    else:
        assert np.isfinite(values.astype(np.float64)).all()


def test_float16_saturates() -> None:
    values = quantize(np.array([1e30, -1e30, 65504.0], np.float32), "float16")
    assert values.tolist() == [65504.0, -65504.0, 65504.0]


@pytest.mark.parametrize("output_dtype", DTYPES)
def test_rows_of_a_batch_are_quantized_independently(output_dtype: OutputDtype) -> None:
    rows = np.random.default_rng(0).normal(size=(32, 192)).astype(np.float32)
    rows[3] *= 50
    batch = quantize(rows, output_dtype)
    assert all(np.array_equal(batch[index], quantize(row, output_dtype)) for index, row in enumerate(rows))
    restored = dequantize(batch, output_dtype, 192)
    assert restored.shape == rows.shape
    assert np.array_equal(restored[5], dequantize(batch[5], output_dtype, 192))


@pytest.mark.parametrize(
    ("dimensions", "step"), [(64, 1 / 127), (144, 1 / 127), (192, 12 / 192**0.5 / 127), (2048, 0.0020879)]
)
def test_step_is_the_documented_formula(dimensions: int, step: float) -> None:
    assert int8_step(dimensions) == pytest.approx(step, rel=1e-4)


def test_no_value_of_a_unit_vector_saturates_up_to_144_dimensions() -> None:
    vector = np.eye(1, 144, dtype=np.float32)[0]
    assert dequantize(quantize(vector, "int8"), "int8", 144)[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("output_dtype", ["int8", "uint8"])
def test_integer_types_need_a_normalized_vector(output_dtype: OutputDtype) -> None:
    check_output_dtype(output_dtype, normalize=True)
    with pytest.raises(InvalidRequest, match=rf"^output_dtype: got {output_dtype} with normalize false; allowed:"):
        check_output_dtype(output_dtype, normalize=False)


@pytest.mark.parametrize("output_dtype", ["float32", "float16", "binary", "ubinary"])
def test_other_types_do_not_need_a_normalized_vector(output_dtype: OutputDtype) -> None:
    check_output_dtype(output_dtype, normalize=False)


# Serialized


@pytest.mark.parametrize("output_dtype", DTYPES)
def test_json_lists_hold_the_exact_values(output_dtype: OutputDtype) -> None:
    vector = finish(np.random.default_rng(1).normal(size=100).astype(np.float32), None, normalize=True)
    values = quantize(vector, output_dtype)
    sent = json.loads(to_json({"embedding": encode_vector(values, "float")}))["embedding"]
    assert np.array_equal(np.array(sent, values.dtype), values)
    is_float = output_dtype in ("float32", "float16")
    assert all(isinstance(value, float if is_float else int) for value in sent)


@pytest.mark.parametrize("output_dtype", DTYPES)
def test_base64_holds_the_little_endian_bytes(output_dtype: OutputDtype) -> None:
    vector = finish(np.random.default_rng(1).normal(size=100).astype(np.float32), None, normalize=True)
    values = quantize(vector, output_dtype)
    data = base64.b64decode(encode_vector(values, "base64"))
    assert np.array_equal(np.frombuffer(data, values.dtype.newbyteorder("<")), values)
    assert to_base64(values.astype(values.dtype.newbyteorder(">"))) == to_base64(values)
    assert len(data) == {"float32": 400, "float16": 200, "int8": 100, "uint8": 100}.get(output_dtype, 13)


def test_table_in_the_documentation_is_the_measured_one() -> None:
    rows = json.loads(output_types.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert output_types.table(rows) in (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")


def test_tied_rows_count_as_half_right() -> None:
    right = np.eye(3, 12, dtype=bool)
    queries = np.ones((3, 4), np.float32)
    gallery = np.concatenate([np.ones((3, 4)), -np.ones((9, 4))]).astype(np.float32)  # the first three are tied
    assert output_types.recalls(queries, gallery, right) == (0.0, 1.0)
    assert output_types.recalls(np.eye(3, 4), np.eye(12, 4), right) == (1.0, 1.0)
