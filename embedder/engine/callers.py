"""Who sends requests. A caller is an API key; without keys, everyone is the same caller."""

from __future__ import annotations

from contextvars import ContextVar

EVERYONE = "everyone"
CALLER: ContextVar[str] = ContextVar("caller", default=EVERYONE)  # of the current request
