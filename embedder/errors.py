"""Everything that can go wrong, as one tree, with who must act.

EmbedderError
    InvalidRequest              the caller changes the request
        InvalidKey
        MissingKey
        NotFound
        MethodNotAllowed
        InvalidMedia
        InputTooLong
        UnsupportedDimensions
        RequestTooLarge
        MediaTooLarge
        UnsupportedContentType
        RangeNotSatisfiable
        HeadTooLarge
    UnsupportedTransferCoding   the caller changes the request
    MediaUnavailable            the owner of a URL acts
    Overloaded                  the caller waits
        SystemLimitReached
    NotReady                    the caller asks another replica
    ShuttingDown                the caller asks another replica
    DeadlineExceeded            the caller sends less
    StorageFailed               the operator acts
    EngineFailed                the operator acts
        DeviceOutOfMemory
    DeviceFailed                the operator acts
    ModelUnavailable            the operator acts; the service does not start

An error knows the status, type and code of its response. Routes raise; `http/boundary.py` renders; metrics read the
code. `docs/generate.py` writes the table of docs/reference/errors.md.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, TypeVar

ErrorType = Literal["invalid_request", "unavailable", "server_error"]

CLIENT_CLOSED_REQUEST = 499  # status in logs and metrics of a request whose caller has disconnected, as in nginx


def counted(number: int, noun: str) -> str:
    """A number and a noun for a message, such as `1 image` or `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class EmbedderError(Exception):
    """An unexpected error inside the service."""

    status: ClassVar[int] = 500
    type: ClassVar[ErrorType] = "server_error"
    code: ClassVar[str] = "internal_error"
    remedy: ClassVar[str] = "Look up the response's `x-request-id` in the service's log, and report it."
    headers: Mapping[str, str] = MappingProxyType({})  # of the response

    def __init__(self, message: str, *, item: int | None = None) -> None:
        """`item`: index of the item in its request; filled in where the index is known."""
        super().__init__(message)
        self.message = message
        self.item = item
        self.details: Mapping[str, Any] = {}  # more fields of the response's body, next to `error`
        self.render: Callable[[EmbedderError], bytes] | None = None  # makes the body where the path does not decide it

    def __str__(self) -> str:
        return self.message if self.item is None else f"item {self.item}: {self.message}"


class InvalidRequest(EmbedderError):
    """The request has a field or a value that is not allowed."""

    status = 400
    type = "invalid_request"
    code = "invalid_request"
    remedy = "Change the request; `message` names the value received and what is allowed."


class InvalidKey(InvalidRequest):
    """The request carries an API key that the service does not know."""

    status = 401
    code = "invalid_api_key"
    remedy = "Check the key, or get a new one from the operator."
    headers = MappingProxyType({"www-authenticate": 'Bearer error="invalid_token"'})


class MissingKey(InvalidRequest):
    """The request carries no API key."""

    status = 401
    code = "missing_api_key"
    remedy = "Send a key as `Authorization: Bearer <key>` or `x-api-key: <key>`."
    headers = MappingProxyType({"www-authenticate": "Bearer"})


class NotFound(InvalidRequest):
    """The path, model, file or batch does not exist."""

    status = 404
    code = "not_found"
    remedy = "Check the URL and the ids in it; `/openapi.json` lists the paths."


class MethodNotAllowed(InvalidRequest):
    """The path exists, but not for this HTTP method."""

    status = 405
    code = "method_not_allowed"
    remedy = "Use a method that the header `Allow` names."

    def __init__(self, message: str, *, allow: str) -> None:
        """`allow`: the methods that the path takes, for the `Allow` header (RFC 9110)."""
        super().__init__(message)
        self.headers = {"allow": allow}


class InvalidMedia(InvalidRequest):
    """The bytes are not a usable image, video or document."""

    code = "invalid_media"
    remedy = "Send another file or another format; `message` says what was found."


class InputTooLong(InvalidRequest):
    """Content that may not be cut (instruction, image and video tokens) does not fit the model's context."""

    code = "input_too_long"
    remedy = "Send less, or ask the operator to raise `EMBEDDER_MAX_INPUT_TOKENS` or `EMBEDDER_MAX_TEXT_CHARS`."


class UnsupportedDimensions(InvalidRequest):
    """The model has no vector of that size."""

    code = "unsupported_dimensions"
    remedy = "Ask for a size in the range that `message` names."


class RequestTooLarge(InvalidRequest):
    """The body or the number of items exceeds a limit."""

    status = 413
    code = "request_too_large"
    remedy = "Send several smaller requests, or ask the operator to raise the setting that `message` names."


class UnsupportedContentType(InvalidRequest):
    """The path does not accept the body's declared type or compression."""

    status = 415
    code = "unsupported_content_type"
    remedy = (
        "Send `Content-Type: application/json` in UTF-8, without compression or with one of gzip, deflate and zstd. "
        "`/img/embed` also takes files."
    )

    def __init__(self, message: str, *, accept_encoding: str = "") -> None:
        """`accept_encoding`: the allowed codings, if the body has another one (RFC 9110, section 15.5.16)."""
        super().__init__(message)
        self.headers = {"accept-encoding": accept_encoding} if accept_encoding else {}


class RangeNotSatisfiable(InvalidRequest):
    """The file has none of the bytes that the header `Range` asks for."""

    status = 416
    code = "range_not_satisfiable"
    remedy = "Ask for bytes within the size that the header `Content-Range` names."

    def __init__(self, message: str, *, content_range: str) -> None:
        """`content_range`: `bytes */N`, with the file's size N (RFC 9110, section 15.5.17)."""
        super().__init__(message)
        self.headers = {"content-range": content_range}


class HeadTooLarge(InvalidRequest):
    """The head of the request, or a trailer, exceeds a limit."""

    status = 431
    code = "head_too_large"
    remedy = "Send fewer and smaller headers, and a shorter URL."


class MediaTooLarge(InvalidRequest):
    """An image, video or page exceeds a limit on bytes, pixels, memory or decoding time."""

    status = 413
    code = "media_too_large"
    remedy = "Send a smaller file, or ask the operator to raise the limit that `message` names."


class UnsupportedTransferCoding(EmbedderError):
    """The request has a `Transfer-Encoding` other than `chunked`."""

    status = 501
    type = "invalid_request"
    code = "unsupported_transfer_coding"
    remedy = "Send the body with `Content-Length` or in chunks. To compress it, use `Content-Encoding`."


class MediaUnavailable(EmbedderError):
    """An image or video could not be fetched from its URL."""

    status = 424
    type = "unavailable"
    code = "media_unavailable"
    remedy = "Make the URL return 200 to the service, or send the bytes."


class Overloaded(EmbedderError):
    """The queue, or the memory for request bodies, is full."""

    status = 429
    type = "unavailable"
    code = "overloaded"
    remedy = "Try again after `Retry-After` seconds. If this happens often, ask the operator to add replicas."

    def __init__(self, message: str, *, retry_after_s: float, item: int | None = None) -> None:
        """`retry_after_s`: estimated seconds until there is capacity again."""
        super().__init__(message, item=item)
        self.retry_after_s = retry_after_s
        self.headers = {"retry-after": str(math.ceil(retry_after_s))}


class SystemLimitReached(Overloaded):
    """The system gives the service no more threads, processes, open files or memory now."""

    status = 503
    code = "system_limit"
    remedy = "Try again after `Retry-After` seconds. The operator finds the limit in the service's log."

    def __init__(self, reason: str) -> None:
        """`reason`: what the system says, such as `Too many open files`."""
        super().__init__(f"the service has reached a limit of its system: {reason}", retry_after_s=5)
        self.reason = reason


class DeadlineExceeded(EmbedderError):
    """The request took longer than allowed, and its items were dropped."""

    status = 504
    type = "unavailable"
    code = "deadline_exceeded"
    remedy = "Send fewer or smaller items, or ask the operator to raise `EMBEDDER_REQUEST_TIMEOUT_S`."


class NotReady(EmbedderError):
    """For probes: the service is shutting down, or its device has failed."""

    status = 503
    type = "unavailable"
    code = "not_ready"
    remedy = "Send requests to another replica until `/readyz` returns 200."


class ShuttingDown(EmbedderError):
    """The service no longer accepts requests."""

    status = 503
    type = "unavailable"
    code = "shutting_down"
    remedy = "Send the request to another replica."


class StorageFailed(EmbedderError):
    """The folder of files and batches cannot be read or written now."""

    status = 503
    type = "unavailable"
    code = "storage_failed"
    remedy = "Try again later. The operator finds the reason in the service's log."


class EngineFailed(EmbedderError):
    """The forward pass failed for this item only."""

    code = "engine_failed"
    remedy = "Look up the response's `x-request-id` in the service's log."


class DeviceOutOfMemory(EngineFailed):
    """A batch, or an item by itself, does not fit into the device's memory."""

    code = "device_out_of_memory"
    remedy = "Send smaller items, or ask the operator to use a device with more memory."


class DeviceFailed(EmbedderError):
    """The device failed, or a computation hangs. All waiting items fail, and the worker exits."""

    code = "device_failed"
    remedy = "Wait for the restart. The operator looks at the driver's messages."


class ModelUnavailable(EmbedderError):
    """The model that the settings name cannot be loaded."""

    code = "model_unavailable"
    remedy = "The service does not start; its last log line says what to change."


_LIMITS = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # EAGAIN: of a process that cannot be started


def system_limit(error: BaseException | None) -> SystemLimitReached | None:
    """The error of a request for which the system had no resources, if that is what caused `error`; else None.

    It is not a bug: the same request works once the service has fewer requests, or a higher limit.
    """
    while error:
        if isinstance(error, OSError) and error.errno in _LIMITS:
            return SystemLimitReached(os.strerror(error.errno))
        if isinstance(error, RuntimeError) and str(error) == "can't start new thread":  # Python has no class for it
            return SystemLimitReached(str(error))
        error = error.__cause__ or error.__context__
    return None


ITEM_ERRORS = (InvalidRequest, MediaUnavailable, EngineFailed)  # errors that a single item can cause


Raised = TypeVar("Raised", bound=EmbedderError)


def without_traceback(error: Raised) -> Raised:
    """Remove traceback and cause from an error that is kept: their frames hold the caller's bytes, in cycles."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class AttributedToItem:
    """Context manager: gives an error of an item that is raised in the block the item's index in its request.

    A class, because it is entered for each request and item, and a generator takes three times as long (0.7 µs on one
    core of an AMD EPYC, `python -m benchmarks.micro`). In a loop, `for block.index, item in enumerate(items)` saves
    entering it again.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ITEM_ERRORS):
            error.item = self.index


@contextmanager
def recorded(index: int, errors: Literal["raise", "return"], outcomes: list[Any]) -> Iterator[None]:
    """An error of an item inside the block gets the item's index, as with `AttributedToItem`.

    With `errors` "return", it is then appended to `outcomes` instead of being raised.
    """
    try:
        with AttributedToItem(index):
            yield
    except ITEM_ERRORS as error:
        if errors == "raise":
            raise
        outcomes.append(error)


@contextmanager
def attributed_to_query() -> Iterator[None]:
    """Make an error of an item that is raised in the block say that the query of a reranking request caused it."""
    try:
        yield
    except ITEM_ERRORS as error:
        error.message = f"query: {error.message}"
        raise


def error_classes(base: type[EmbedderError] = EmbedderError) -> list[type[EmbedderError]]:
    """The base class and everything that is derived from it in this module."""
    children = [child for child in base.__subclasses__() if child.__module__ == base.__module__]
    return [base, *(kind for child in children for kind in error_classes(child))]


def errors_table() -> str:
    """The errors that callers can get, as a Markdown table, for docs/reference/errors.md."""
    rows = ["| status | code | type | meaning | what to do |", "|---|---|---|---|---|"]
    sent = [kind for kind in error_classes() if kind is not ModelUnavailable]
    for kind in sorted(sent, key=lambda kind: (kind.status, kind.code)):
        rows.append(f"| {kind.status} | `{kind.code}` | `{kind.type}` | {kind.__doc__} | {kind.remedy} |")
    return "\n".join(rows)
