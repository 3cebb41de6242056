"""What enters the queue: limits per item, the limit in estimated tokens, reservations, and the time to retry."""

from __future__ import annotations

import pytest

from embedder.engine.admission import (
    TOKENS_PER_IMAGE,
    TOKENS_PER_VIDEO,
    Admission,
    check_dimensions,
    check_item,
    estimate_request_tokens,
    estimate_tokens,
)
from embedder.engine.callers import EVERYONE
from embedder.engine.postprocess import MIN_DIMENSIONS
from embedder.errors import InputTooLong, Overloaded, RequestTooLarge, UnsupportedDimensions
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.preprocess import MAX_PREFIX_TOKENS
from embedder.settings import Settings
from tests.fake_model import item

SETTINGS = Settings(max_queued_tokens=1000, max_input_tokens=512, request_timeout_s=7)


# Items


@pytest.mark.parametrize("dimensions", [None, 64, 65, 191, 192])
def test_dimensions_within_the_range_are_allowed(dimensions: int | None) -> None:
    check_dimensions(dimensions, 192)


@pytest.mark.parametrize("dimensions", [63, 193, 1, 10**30])
def test_dimensions_outside_the_range_are_refused_with_the_range(dimensions: int) -> None:
    with pytest.raises(UnsupportedDimensions) as caught:
        check_dimensions(dimensions, 192)
    assert str(caught.value) == f"dimensions: got {dimensions!r}; allowed: a whole number from 64 to 192"


def test_model_smaller_than_the_least_dimensions_allows_its_whole_vector() -> None:
    check_dimensions(8, 8)
    with pytest.raises(UnsupportedDimensions, match=r"from 8 to 8$"):
        check_dimensions(MIN_DIMENSIONS, 8)


def test_characters_of_all_texts_and_of_the_instruction_have_a_limit() -> None:
    settings = Settings(max_text_chars=10)
    check_item(EmbeddingItem((Text("12345"), Text("67890")), instruction="x" * 10), settings, 8)
    text = r"^text of 11 characters; allowed: up to 10 \(EMBEDDER_MAX_TEXT_CHARS\)"
    for truncate, rest in (("none", "$"), ("end", "; truncation does not apply above this limit$")):
        with pytest.raises(InputTooLong, match=text + rest):
            check_item(EmbeddingItem((Text("12345"), Text("678901")), truncate=truncate), settings, 8)
    with pytest.raises(
        InputTooLong, match=r"^instruction of 11 characters; allowed: up to 10 \(EMBEDDER_MAX_TEXT_CHARS\)$"
    ):
        check_item(item("x", instruction="x" * 11), settings, 8)


# Estimates


def test_estimate_counts_characters_images_and_frames() -> None:
    settings = Settings()
    text, image = estimate_tokens(item("x" * 400), settings), EmbeddingItem((Image(b""),))
    assert text == 130
    assert estimate_tokens(image, settings) == 30 + TOKENS_PER_IMAGE
    assert estimate_tokens(EmbeddingItem((Video((b"",) * 4),)), settings) == 30 + 4 * TOKENS_PER_IMAGE
    assert estimate_tokens(EmbeddingItem((Video(b""),)), settings) == 30 + TOKENS_PER_VIDEO


def test_estimate_counts_an_instruction_that_is_not_computed_once_for_many_items() -> None:
    def estimate(num_tokens: int) -> int:
        return estimate_tokens(EmbeddingItem((Text("red"),), instruction="x" * 4 * num_tokens), Settings())

    assert estimate(MAX_PREFIX_TOKENS) == 30
    assert estimate(MAX_PREFIX_TOKENS + 1) == 30 + MAX_PREFIX_TOKENS + 1


def test_estimate_is_at_most_the_tokens_to_which_items_are_cut() -> None:
    assert estimate_tokens(item("x" * 100_000), SETTINGS) == 512


def test_request_that_exceeds_even_an_empty_queue_is_refused() -> None:
    long = item("x" * 100_000)
    assert estimate_request_tokens([], SETTINGS) == 0
    assert estimate_request_tokens([long], Settings(max_queued_tokens=100, max_input_tokens=512)) == 512
    with pytest.raises(RequestTooLarge, match="about 1024 tokens; allowed: up to 1000 in one request"):
        estimate_request_tokens([long, long], SETTINGS)


# The queue


def test_queue_is_full_when_the_limit_would_be_exceeded() -> None:
    admission = Admission(SETTINGS)
    admission.admit(600, None, 0.0)
    admission.admit(400, None, 0.0)
    with pytest.raises(Overloaded, match="1000 tokens wait, and this request has about 1; allowed: up to 1000"):
        admission.admit(1, None, 0.0)
    assert admission.pending_tokens == 1000
    admission.release([(EVERYONE, 600)], num_cancelled_tokens=0, now_s=1.0)
    assert admission.has_capacity(600)
    assert not admission.has_capacity(601)


def test_empty_queue_accepts_an_item_over_the_limit() -> None:
    admission = Admission(SETTINGS)
    admission.admit(5000, None, 0.0)
    assert not admission.has_capacity(1)


def test_items_of_a_reservation_enter_a_full_queue() -> None:
    admission = Admission(SETTINGS)
    reservation = admission.reserve(900)
    with pytest.raises(Overloaded):
        admission.admit(200, None, 0.0)
    admission.admit(400, reservation, 0.0)
    assert admission.pending_tokens == 900
    admission.release_reservation(reservation)
    assert admission.pending_tokens == 400
    admission.release([(EVERYONE, 400)], num_cancelled_tokens=0, now_s=1.0)
    assert admission.pending_tokens == 0


def test_reservation_that_does_not_fit_is_refused_and_one_of_nothing_never_is() -> None:
    admission = Admission(SETTINGS)
    admission.admit(900, None, 0.0)
    with pytest.raises(Overloaded):
        admission.reserve(101)
    admission.reserve(100)
    assert admission.reserve(0).num_tokens == 0
    assert admission.pending_tokens == 1000


# The time to retry, in virtual time


def retry_after_s(admission: Admission) -> float:
    with pytest.raises(Overloaded) as refusal:
        admission.reserve(SETTINGS.max_queued_tokens)
    return refusal.value.retry_after_s


def test_time_to_retry_is_the_time_in_which_the_queue_drains_at_the_measured_rate() -> None:
    admission = Admission(SETTINGS)
    admission.admit(100, None, 50.0)  # the time before the first item does not count
    admission.release([(EVERYONE, 100)], num_cancelled_tokens=0, now_s=50.5)
    admission.admit(600, None, 90.0)  # nor does a pause
    assert retry_after_s(admission) == pytest.approx(3.0)


def test_time_to_retry_is_at_least_one_second() -> None:
    admission = Admission(SETTINGS)
    admission.admit(100, None, 0.0)
    admission.release([(EVERYONE, 100)], num_cancelled_tokens=0, now_s=0.01)
    admission.admit(100, None, 1.0)
    assert retry_after_s(admission) == 1.0


def test_time_to_retry_is_at_most_the_time_limit_of_a_request() -> None:
    """Cancelled items make the queue look slow: time passes, and no item is computed."""
    admission = Admission(SETTINGS)
    for minute in range(20):
        admission.admit(100, None, 60.0 * minute)
        admission.release([(EVERYONE, 100)], num_cancelled_tokens=100, now_s=60.0 * minute + 60)
    admission.admit(100, None, 1200.0)
    admission.release([(EVERYONE, 100)], num_cancelled_tokens=0, now_s=1260.0)
    admission.admit(500, None, 1260.0)
    assert retry_after_s(admission) == SETTINGS.request_timeout_s
