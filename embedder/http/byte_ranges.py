"""The header `Range` of a request for a file (RFC 9110, section 14.2)."""

from __future__ import annotations

import re

from starlette.types import Scope

_RANGE = re.compile(r"([0-9]*)-([0-9]*)")


def correct_range(scope: Scope, num_bytes: int) -> None:
    """Change the request's `Range` to what Starlette's `FileResponse` responds to as the RFC says.

    Starlette refuses a header that is not valid, which may be ignored, and one with another unit, which must be
    ignored. It refuses all ranges if the file, of `num_bytes`, lacks one of them.
    """
    headers = []
    for name, value in scope["headers"]:
        if name != b"range":
            headers.append((name, value))
        elif scope["method"] == "GET" and (ranges := _ranges(value.decode("latin-1"), num_bytes)):
            headers.append((name, ranges.encode()))
    scope["headers"] = headers


def _ranges(header: str, num_bytes: int) -> str:
    """The header with those ranges that the file has, or with all if it has none. Empty if the header is not valid."""
    unit, _, text = header.partition("=")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if unit.strip().lower() != "bytes" or not all(map(_is_valid, parts)):
        return ""
    return "bytes=" + ",".join([part for part in parts if _is_satisfiable(part, num_bytes)] or parts) if parts else ""


def _is_valid(part: str) -> bool:
    match = _RANGE.fullmatch(part)
    if not match or part == "-":
        return False
    first, last = match.groups()
    return not (first and last) or int(first) <= int(last)


def _is_satisfiable(part: str, num_bytes: int) -> bool:
    first, _, last = part.partition("-")
    return int(first) < num_bytes if first else int(last) > 0
