"""A row is cut first, then normalized."""

from __future__ import annotations

import numpy as np
import pytest

from embedder.engine.postprocess import finish_vectors
from embedder.errors import EngineFailed
from tests.conftest import finish

ROW = np.random.default_rng(0).normal(0, 3, 192).astype(np.float32)


@pytest.mark.parametrize("dimensions", [None, 64, 100, 192])
def test_normalized_vector_has_unit_length_at_every_size(dimensions: int | None) -> None:
    vector = finish(ROW, dimensions, normalize=True)
    assert vector.shape == (dimensions or 192,)
    assert vector.dtype == np.float32
    assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-6


def test_vector_is_cut_before_it_is_normalized() -> None:
    expected = ROW[:64].astype(np.float64) / np.linalg.norm(ROW[:64].astype(np.float64))
    assert np.abs(finish(ROW, 64, normalize=True) - expected).max() < 1e-7
    wrong = ROW[:64] / np.linalg.norm(ROW)  # the other order
    assert np.abs(finish(ROW, 64, normalize=True) - wrong).max() > 1e-3


def test_without_normalize_the_values_are_those_of_the_model() -> None:
    assert np.array_equal(finish(ROW, 64, normalize=False), ROW[:64])
    assert np.array_equal(finish(ROW, None, normalize=False), ROW)


def test_row_itself_is_not_changed() -> None:
    row = ROW.copy()
    finish(row, 64, normalize=True)
    assert np.array_equal(row, ROW)


def test_zero_row_gives_a_zero_vector() -> None:
    assert (finish(np.zeros(64, np.float32), None, normalize=True) == 0).all()


def test_each_row_gets_its_own_options_and_does_not_depend_on_the_others() -> None:
    rows = np.random.default_rng(1).normal(0, 3, (50, 192)).astype(np.float32)
    choices: list[tuple[int | None, bool]] = [(None, True), (64, True), (64, False), (100, True), (None, False)]
    options = [choices[number % 5] for number in range(50)]
    vectors = finish_vectors(rows, options)
    for row, (dimensions, normalize), vector in zip(rows, options, vectors, strict=True):
        assert np.array_equal(vector, finish(row, dimensions, normalize=normalize))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])  # the square of the last one is infinite
@pytest.mark.parametrize("normalize", [True, False])
def test_value_that_is_not_finite_is_an_error_of_its_row_only(value: float, normalize: bool) -> None:
    rows = np.tile(ROW, (3, 1))
    rows[1, 5] = value
    first, failure, last = finish_vectors(rows, [(None, normalize)] * 3)
    assert isinstance(failure, EngineFailed)
    assert "not finite" in str(failure)
    expected = finish(ROW, None, normalize=normalize)
    assert np.array_equal(first, expected)
    assert np.array_equal(last, expected)
