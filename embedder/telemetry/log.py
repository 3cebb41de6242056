"""BentoML's log -> ours in it, each line with its request's id, as text or JSON; and nothing of a caller's body.

A request's id is the caller's `x-request-id` if it is a short plain word, else made here. It is in every line that is
written while the request is worked at, in whatever thread, and in the header of its answer.
"""

from __future__ import annotations

import contextvars
import json
import logging
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

from bentoml.exceptions import BentoMLException
from pydantic import ValidationError

access = logging.getLogger("embedder.access")

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_MAX_ROUTE_CHARS = 100


@dataclass
class RequestLog:
    """What the log says of one request. Counts stay None where nothing was embedded."""

    id: str
    start_s: float = field(default_factory=time.monotonic)
    num_items: int | None = None
    num_tokens: int | None = None

    def write(self, method: str, path: str, status: int | None) -> None:
        """Its line: how it was asked, what became of it, nothing of what it held. Without a status nobody waited."""
        fields = {
            "method": method,
            "route": quote(path)[:_MAX_ROUTE_CHARS],
            "status": status,
            "items": self.num_items,
            "tokens": self.num_tokens,
            "ms": round((time.monotonic() - self.start_s) * 1000, 1),
        }
        words = " ".join(f"{name}={'-' if value is None else value}" for name, value in fields.items())
        access.info("%s", words, extra={"fields": fields})


_current: contextvars.ContextVar[RequestLog | None] = contextvars.ContextVar("request", default=None)


def begin_request(headers: Iterable[tuple[bytes, bytes]]) -> RequestLog:
    """The log of a request that came with these headers; from now on the current one."""
    given = next((value for name, value in headers if name.lower() == b"x-request-id"), b"")
    request = RequestLog(given.decode() if _SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}")
    _current.set(request)
    return request


def count_items(num_items: int, num_tokens: int) -> None:
    """What the current request, if there is one, embedded."""
    if request := _current.get():
        request.num_items, request.num_tokens = num_items, num_tokens


def request_id() -> str:
    """The current request's id; empty where there is none."""
    request = _current.get()
    return request.id if request else ""


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """BentoML's handlers also for our lines; and none of its tracebacks, bodies and all, for what a caller did."""
    ours, theirs = logging.getLogger("embedder"), logging.getLogger("bentoml")
    for handler in theirs.handlers:
        handler.addFilter(_name_request)
        if log_format == "json":
            handler.setFormatter(JsonLines())
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)
    logging.getLogger("bentoml._internal.server.http_app").addFilter(lambda record: not _blames_caller(record))


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """`time`, `level`, `logger`, `message`, and where there are such `request_id`, `fields` and `exception`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if name := request_id():
            line["request_id"] = name
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _name_request(record: logging.LogRecord) -> bool:
    """The id where BentoML's format shows a trace's."""
    if name := request_id():
        record.trace_msg = f" (request={name})"
    return True


def _blames_caller(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, BentoMLException):
        return error.error_code < 500
    return isinstance(error, ValidationError)
