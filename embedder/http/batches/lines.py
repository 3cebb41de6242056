"""The lines of an input file, in order: `{"custom_id": .., "method": "POST", "url": .., "body": {..}}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from embedder.errors import EmbedderError, InvalidRequest, RequestTooLarge
from embedder.http.json_limits import exceeds_value_count, max_values
from embedder.http.request_body import read_json
from embedder.inputs.items import check_text, describe_value
from embedder.settings import Settings

MAX_LINES = 50_000  # OpenAI's
MAX_FAULTS = 20  # reported of one file
MAX_ID_CHARS = 512


@dataclass(frozen=True)
class Line:
    """One request of a batch; `body`: its fields."""

    custom_id: str
    body: Mapping[str, Any]


def read_line(data: bytes, endpoint: str, settings: Settings) -> Line:
    """Parse a line. Raises `InvalidRequest` and `RequestTooLarge`."""
    allowed = max_values(settings.max_items_per_request)
    if exceeds_value_count(data, allowed):
        raise RequestTooLarge(f"more than {allowed} JSON values in a line, as in the body of a request")
    fields = read_json(data)
    custom_id, body = fields.get("custom_id"), fields.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        raise InvalidRequest(f"custom_id: got {describe_value(custom_id)}; allowed: 1 to {MAX_ID_CHARS} characters")
    check_text("custom_id", custom_id)
    if fields.get("method") != "POST":
        raise InvalidRequest(f"method: got {describe_value(fields.get('method'))}; allowed: POST")
    if fields.get("url") != endpoint:
        raise InvalidRequest(f"url: got {describe_value(fields.get('url'))}; allowed: {endpoint}, the batch's endpoint")
    if not isinstance(body, dict):
        raise InvalidRequest(f"body: got {describe_value(body)}; allowed: an object")
    return Line(custom_id, body)


def raw_lines(path: Path) -> Iterator[bytes]:
    """The lines that are not empty."""
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield line


def check_lines(path: Path, endpoint: str, settings: Settings) -> tuple[int, list[dict[str, Any]]]:
    """The number of lines, and the first faults of the file in OpenAI's form."""
    faults: list[dict[str, Any]] = []
    ids: set[str] = set()
    count = 0
    for count, data in enumerate(raw_lines(path), 1):
        try:
            if count > MAX_LINES:
                raise RequestTooLarge(f"more than {MAX_LINES} lines")
            line = read_line(data, endpoint, settings)
            if line.custom_id in ids:
                raise InvalidRequest(f"custom_id: {line.custom_id!r} is in an earlier line, too")
            ids.add(line.custom_id)
        except EmbedderError as error:
            faults.append({"code": error.code, "message": error.message, "param": None, "line": count})
        if count > MAX_LINES or len(faults) >= MAX_FAULTS:
            break
    if not count:
        faults.append({"code": "empty_file", "message": "the file has no lines", "param": None, "line": None})
    return count, faults


def response_line(line: Line, identifier: str, status: int, body: bytes) -> bytes:
    """The line of an output or error file; `body` is JSON."""
    response = {"status_code": status, "request_id": identifier, "body": orjson.Fragment(body)}
    return orjson.dumps(
        {"id": f"batch_req_{identifier}", "custom_id": line.custom_id, "response": response, "error": None},
        option=orjson.OPT_APPEND_NEWLINE,
    )
