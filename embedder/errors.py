"""Everything that can go wrong, as one tree: four branches by who must act.

EmbedderError
    InvalidRequest              the caller changes it          400
        InvalidKey                                             401
        InvalidMedia
        InputTooLong
        UnsupportedDimensions
        RequestTooLarge                                        413
        MediaTooLarge                                          413
        UnsupportedContentType                                 415
    MediaUnavailable            the address's owner acts       424
    Overloaded                  the caller waits               429
    DeadlineExceeded            the caller sends less          504
    ShuttingDown                the caller asks another one    503
    EngineFailed                we act                         500
        DeviceOutOfMemory
    DeviceFailed                we act                         500
    ModelUnavailable            the operator acts              the service does not start
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar


class EmbedderError(Exception):
    """Base of all errors raised on purpose.

    `code` is stable and goes to the caller. `item` is the index of the item in its request, filled in where the
    index is known (the steps see one item at a time).
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, item: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.item = item

    def __str__(self) -> str:
        return self.message if self.item is None else f"item {self.item}: {self.message}"


class InvalidRequest(EmbedderError):
    """The request says something that cannot be done; the caller changes it."""

    code = "invalid_request"


class InvalidKey(InvalidRequest):
    """No API key came with the request, or none of ours."""

    code = "invalid_api_key"


class InvalidMedia(InvalidRequest):
    """The bytes are not a usable picture or clip."""

    code = "invalid_media"


class InputTooLong(InvalidRequest):
    """What may not be cut (instruction, image and video tokens) does not fit the model's context."""

    code = "input_too_long"


class UnsupportedDimensions(InvalidRequest):
    """The model has no vector of that size."""

    code = "unsupported_dimensions"


class RequestTooLarge(InvalidRequest):
    """The body or the number of items is over a limit."""

    code = "request_too_large"


class UnsupportedContentType(InvalidRequest):
    """The body is declared to be something else than JSON."""

    code = "unsupported_content_type"


class MediaTooLarge(InvalidRequest):
    """A picture or clip is over a limit on bytes or pixels."""

    code = "media_too_large"


class MediaUnavailable(EmbedderError):
    """A media address could not be fetched."""

    code = "media_unavailable"


class Overloaded(EmbedderError):
    """The queue is full. `retry_after_s` estimates when it will have drained."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float, item: int | None = None) -> None:
        super().__init__(message, item=item)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EmbedderError):
    """The request took longer than the limit; its items were given up."""

    code = "deadline_exceeded"


class ShuttingDown(EmbedderError):
    """The engine no longer takes work."""

    code = "shutting_down"


class EngineFailed(EmbedderError):
    """The forward pass failed for this item alone; details are in the log."""

    code = "engine_failed"


class DeviceOutOfMemory(EngineFailed):
    """A batch, or an item that was tried alone, does not fit the device's memory."""

    code = "device_out_of_memory"


class DeviceFailed(EmbedderError):
    """The device is lost to this process, or does not answer: every item that waited fails, and the worker ends."""

    code = "device_failed"


class ModelUnavailable(EmbedderError):
    """The model named in the settings cannot be loaded; the message says why and what to do."""

    code = "model_unavailable"


NO_ANSWER = 499  # status of a request whose caller went away, as nginx says it

ITEM_ERRORS = (InvalidRequest, MediaUnavailable, EngineFailed)  # what one item can be to blame for


Raised = TypeVar("Raised", bound="EmbedderError")


def without_traceback(error: Raised) -> Raised:
    """The error without the frames it came through, for those who keep it: frames hold a caller's bytes, in cycles."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


@contextmanager
def attributed_to_item(index: int) -> Iterator[None]:
    """What an item is to blame for and is raised inside says which item it was."""
    try:
        yield
    except ITEM_ERRORS as error:
        error.item = index
        raise
