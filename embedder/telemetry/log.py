"""Log lines of requests, as text or JSON: each names its request, and none contains a request's content.

A request's id is the caller's `x-request-id` if that is short and plain, otherwise random. It is in every line that is
logged for the request, in any thread, and in a header of its response.
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
from typing import Any
from urllib.parse import quote

access = logging.getLogger("embedder.access")

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_MAX_ROUTE_CHARS = 100


@dataclass
class RequestLog:
    """What the log says about one request. Counts are None if nothing was embedded."""

    id: str
    start_s: float = field(default_factory=time.monotonic)
    num_items: int | None = None
    num_tokens: int | None = None

    def write(self, method: str, path: str, status: int) -> None:
        """Write the request's line in the access log."""
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
    """Make the request with these headers the current one."""
    given = next((value for name, value in headers if name.lower() == b"x-request-id"), b"")
    request = RequestLog(given.decode() if _SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}")
    _current.set(request)
    return request


def count_items(num_items: int, num_tokens: int) -> None:
    """Record how much the current request, if there is one, embedded."""
    if request := _current.get():
        request.num_items, request.num_tokens = num_items, num_tokens


def request_id() -> str:
    """The current request's id; empty outside of requests."""
    request = _current.get()
    return request.id if request else ""


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """`time`, `level`, `logger`, `message`, and if present `request_id`, `exception` and a request's fields."""
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
