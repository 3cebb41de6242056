"""BentoML's log -> ours in it, and nothing of a caller's body."""

from __future__ import annotations

import logging

from bentoml.exceptions import BentoMLException
from pydantic import ValidationError


def share_log() -> None:
    """BentoML's handlers also for our lines; and none of its tracebacks, bodies and all, for what a caller did."""
    ours, theirs = logging.getLogger("embedder"), logging.getLogger("bentoml")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)
    logging.getLogger("bentoml._internal.server.http_app").addFilter(lambda record: not _blames_caller(record))


def _blames_caller(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, BentoMLException):
        return error.error_code < 500
    return isinstance(error, ValidationError)
