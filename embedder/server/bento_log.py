"""Log lines of this package through BentoML's handlers, and no BentoML tracebacks of invalid requests."""

from __future__ import annotations

import logging
from typing import Literal

from bentoml.exceptions import BentoMLException
from pydantic import ValidationError

from embedder.telemetry.log import JsonLines, request_id


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Send the lines of the logger `embedder` to BentoML's handlers, each with its request's id.

    BentoML logs a traceback for each request that it refuses, and the traceback holds the request's body.
    """
    ours, theirs = logging.getLogger("embedder"), logging.getLogger("bentoml")
    for handler in theirs.handlers:
        handler.addFilter(_add_request_id)
        if log_format == "json":
            handler.setFormatter(JsonLines())
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)
    theirs.propagate = False
    logging.getLogger().handlers = theirs.handlers  # of all other libraries, from warnings on
    logging.captureWarnings(True)
    logging.getLogger("bentoml._internal.server.http_app").addFilter(lambda record: not _is_client_error(record))


def _add_request_id(record: logging.LogRecord) -> bool:
    """Put the request's id where BentoML's log format has the trace id."""
    if name := request_id():
        record.trace_msg = f" (request={name})"
    return True


def _is_client_error(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, BentoMLException):
        return error.error_code < 500
    return isinstance(error, ValidationError)
