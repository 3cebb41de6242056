"""`priority`, vLLM's field, in the body of every route that embeds or scores: a request may let others go first.

The engine gets a number that no caller can use against others: see `engine/priority.py`.
"""

from __future__ import annotations

from typing import Any

from embedder.errors import InvalidRequest
from embedder.inputs.items import describe_value

PRIORITY = "priority"
SCHEMA: dict[str, Any] = {
    "type": ["integer", "null"],
    "default": 0,
    "description": (
        "A higher number lets requests of lower numbers go first, for a bounded time. 0 is the earliest: a negative "
        "number counts as 0."
    ),
}


def read_priority(value: Any) -> int:
    """The priority of a request that has this value in its body; 0 if it has none. Raises `InvalidRequest`."""
    if value is None:
        return 0
    if type(value) is not int:
        raise InvalidRequest(f"{PRIORITY}: got {describe_value(value)}; allowed: a whole number; 0 is the default")
    return max(0, value)
