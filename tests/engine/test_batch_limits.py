"""Batches shrink at once after an out-of-memory error, and grow back step by step."""

from __future__ import annotations

import logging

import pytest

from embedder.engine.batch_limits import FITTING_BATCHES, BatchLimit


def grow(limit: BatchLimit, num_batches: int) -> None:
    for _ in range(num_batches):
        limit.grow()


def test_limit_is_half_of_the_batch_that_did_not_fit() -> None:
    limit = BatchLimit(1024)
    limit.shrink(1000)
    assert limit.max_tokens == 500
    limit.shrink(300)
    assert limit.max_tokens == 150


def test_half_of_a_split_batch_does_not_raise_the_limit() -> None:
    limit = BatchLimit(1024)
    limit.shrink(200)
    limit.shrink(1000)  # was launched before
    assert limit.max_tokens == 100


def test_limit_doubles_after_enough_fitting_batches_up_to_the_setting() -> None:
    limit = BatchLimit(1024)
    limit.shrink(600)
    sizes = []
    for _ in range(4):
        grow(limit, FITTING_BATCHES - 1)
        sizes.append(limit.max_tokens)
        limit.grow()
    assert sizes == [300, 600, 1024, 1024]


def test_batch_that_does_not_fit_restarts_the_count() -> None:
    limit = BatchLimit(1024)
    limit.shrink(600)
    grow(limit, FITTING_BATCHES - 1)
    limit.shrink(600)
    grow(limit, FITTING_BATCHES - 1)
    assert limit.max_tokens == 300
    limit.grow()
    assert limit.max_tokens == 600


def test_every_change_is_logged_with_the_new_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    limit = BatchLimit(1024)
    limit.shrink(600)
    grow(limit, FITTING_BATCHES)
    assert [record.getMessage() for record in caplog.records] == [
        "the device is out of memory: batches are limited to 300 tokens for now",
        "batches may have 600 tokens again",
    ]
