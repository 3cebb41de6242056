"""A row is cut first, then brought to unit length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedder.engine.postprocess import MIN_DIMENSIONS, check_dimensions, finish_vectors
from embedder.errors import EngineFailed, UnsupportedDimensions
from tests.conftest import finish

ROW = np.random.default_rng(0).normal(0, 3, 192).astype(np.float32)


@pytest.mark.parametrize("dimensions", [None, 64, 100, 192])
def test_vector_has_unit_length_whatever_its_size(dimensions: int | None) -> None:
    vector = finish(ROW, dimensions, normalize=True)
    assert vector.shape == (dimensions or 192,)
    assert vector.dtype == np.float32
    assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-6


def test_vector_is_cut_before_it_is_normalized() -> None:
    expected = ROW[:64].astype(np.float64) / np.linalg.norm(ROW[:64].astype(np.float64))
    assert np.abs(finish(ROW, 64, normalize=True) - expected).max() < 1e-7
    wrong = ROW[:64] / np.linalg.norm(ROW)  # the other order
    assert np.abs(finish(ROW, 64, normalize=True) - wrong).max() > 1e-3


def test_without_normalize_the_values_are_the_models() -> None:
    assert np.array_equal(finish(ROW, 64, normalize=False), ROW[:64])
    assert np.array_equal(finish(ROW, None, normalize=False), ROW)


def test_row_itself_is_not_changed() -> None:
    row = ROW.copy()
    finish(row, 64, normalize=True)
    assert np.array_equal(row, ROW)


def test_zero_row_gives_zeros_not_a_division_by_zero() -> None:
    assert (finish(np.zeros(64, np.float32), None, normalize=True) == 0).all()


def test_each_row_is_finished_as_it_wants_and_as_it_would_be_alone() -> None:
    rows = np.random.default_rng(1).normal(0, 3, (50, 192)).astype(np.float32)
    wishes: list[tuple[int | None, bool]] = [(None, True), (64, True), (64, False), (100, True), (None, False)]
    wanted = [wishes[number % 5] for number in range(50)]
    vectors = finish_vectors(rows, wanted)
    for row, (dimensions, normalize), vector in zip(rows, wanted, vectors, strict=True):
        assert np.array_equal(vector, finish(row, dimensions, normalize=normalize))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])  # the last one's square is infinite
@pytest.mark.parametrize("normalize", [True, False])
def test_value_that_is_not_finite_is_our_error_and_spoils_no_other(value: float, normalize: bool) -> None:
    rows = np.tile(ROW, (3, 1))
    rows[1, 5] = value
    first, failure, last = finish_vectors(rows, [(None, normalize)] * 3)
    assert isinstance(failure, EngineFailed)
    assert "not finite" in str(failure)
    expected = finish(ROW, None, normalize=normalize)
    assert np.array_equal(first, expected)
    assert np.array_equal(last, expected)


@pytest.mark.parametrize("dimensions", [None, 64, 65, 191, 192])
def test_dimensions_within_the_range_are_allowed(dimensions: int | None) -> None:
    check_dimensions(dimensions, 192)


@pytest.mark.parametrize("dimensions", [63, 193, 0, -1, 64.0, "64", True, [64], 1.2e29, float("nan"), {}])
def test_dimensions_outside_the_range_are_refused_with_the_range(dimensions: Any) -> None:
    with pytest.raises(UnsupportedDimensions) as caught:
        check_dimensions(dimensions, 192)
    assert str(caught.value) == f"dimensions: got {dimensions!r}; allowed: a whole number from 64 to 192"


def test_long_wrong_dimensions_are_shortened() -> None:
    with pytest.raises(UnsupportedDimensions) as caught:
        check_dimensions("x" * 10_000, 192)  # type: ignore[arg-type]  # what a caller may send
    assert len(str(caught.value)) < 150


def test_model_narrower_than_the_least_size_gives_its_whole_vector() -> None:
    check_dimensions(8, 8)
    with pytest.raises(UnsupportedDimensions, match=r"from 8 to 8$"):
        check_dimensions(MIN_DIMENSIONS, 8)
