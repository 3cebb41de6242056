"""The tree of errors, their attributes, and which errors get the index of an item."""

from __future__ import annotations

import errno
import os
import re
import threading

import pytest

from embedder import errors
from embedder.errors import (
    AttributedToItem,
    DeadlineExceeded,
    DeviceFailed,
    EmbedderError,
    EngineFailed,
    InvalidMedia,
    InvalidRequest,
    MediaUnavailable,
    ModelUnavailable,
    Overloaded,
    ShuttingDown,
    counted,
    errors_table,
    system_limit,
)

CLASSES = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, EmbedderError)
}


def test_tree_in_the_docstring_matches_the_classes() -> None:
    drawn: dict[str, str] = {}
    ancestors: list[str] = []
    for line in (errors.__doc__ or "").split("\n\n")[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        name = line.split()[0]
        ancestors[depth:] = [name]
        drawn[name] = ancestors[depth - 1] if depth else "Exception"
    assert drawn == {name: kind.__base__.__name__ for name, kind in CLASSES.items() if kind.__base__}


@pytest.mark.parametrize(("number", "text"), [(0, "0 items"), (1, "1 item"), (2, "2 items")])
def test_count_in_a_message_is_singular_or_plural(number: int, text: str) -> None:
    assert counted(number, "item") == text


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in CLASSES.values()]
    assert len(set(codes)) == len(codes)


def test_only_errors_of_callers_and_of_waiting_have_a_4xx_status() -> None:
    of_callers = {kind for kind in CLASSES.values() if issubclass(kind, InvalidRequest)}
    assert all(400 <= kind.status < 500 and kind.type == "invalid_request" for kind in of_callers)
    others = {kind.status for kind in CLASSES.values() if kind not in of_callers}
    assert others == {424, 429, 500, 501, 503, 504}  # 501: RFC 9112, section 6.1, for a transfer coding


def start_a_thread_without_memory() -> None:
    """No system gives a thread a stack of 128 TiB."""
    previous = threading.stack_size(2**47)
    try:
        threading.Thread(target=print).start()
    finally:
        threading.stack_size(previous)


def test_limit_of_the_system_is_found_also_below_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        start_a_thread_without_memory()
    limit = system_limit(caught.value)
    assert limit
    assert limit.reason == "can't start new thread"
    for number in (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        error = KeyError("the chain's end")
        error.__cause__ = ValueError("the middle")
        error.__cause__.__context__ = OSError(number, "secret", "/secret")
        limit = system_limit(error)
        assert limit
        assert limit.reason == os.strerror(number)
    for other in (RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "missing"), OSError("no number")):
        assert system_limit(other) is None


def test_table_has_every_error_that_a_caller_can_get() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `(\w+)` \| (.+) \| (.+) \|$", errors_table(), re.MULTILINE)
    assert {code for _, code, *_ in rows} == {kind.code for kind in CLASSES.values()} - {ModelUnavailable.code}
    assert all(len(meaning) > 20 and len(remedy) > 20 for *_, meaning, remedy in rows)


def test_message_names_the_item_once_it_is_known() -> None:
    error = InvalidMedia("image is empty")
    assert str(error) == "image is empty"
    error.item = 0  # the first, which is falsy
    assert str(error) == "item 0: image is empty"
    assert error.message == "image is empty"


def test_item_may_be_given_to_the_constructor() -> None:
    assert str(InvalidRequest("no", item=3)) == "item 3: no"


def test_overloaded_has_the_time_to_retry_after() -> None:
    error = Overloaded("full", retry_after_s=2.5, item=1)
    assert (error.retry_after_s, error.item) == (2.5, 1)


@pytest.mark.parametrize("error", [InvalidRequest("x"), InvalidMedia("x"), MediaUnavailable("x"), EngineFailed("x")])
def test_error_that_an_item_causes_gets_its_index(error: EmbedderError) -> None:
    with pytest.raises(type(error)) as caught, AttributedToItem(7):
        raise error
    assert caught.value is error
    assert error.item == 7


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("x", retry_after_s=1),
        ShuttingDown("x"),
        DeadlineExceeded("x"),
        DeviceFailed("x"),
        ModelUnavailable("x"),
    ],
)
def test_error_of_the_services_state_gets_no_item_index(error: EmbedderError) -> None:
    with pytest.raises(type(error)), AttributedToItem(7):
        raise error
    assert error.item is None


def test_other_exceptions_and_results_pass_unchanged() -> None:
    with AttributedToItem(0):
        value = 1
    assert value == 1
    with pytest.raises(ZeroDivisionError), AttributedToItem(0):
        value //= 0
