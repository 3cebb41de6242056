"""Callers, and how they share what is limited: the queue, the device, and memory for the bodies of requests.

A caller is an API key. However many requests a caller sends, the device's time is shared equally between the callers
that wait for it (`scheduler`), and no caller can use up a capacity by itself (`SharedCapacity`).
Without keys, everyone is the same caller.
"""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar

EVERYONE = "everyone"
CALLER: ContextVar[str] = ContextVar("caller", default=EVERYONE)  # of the current request

FREE_MULTIPLE = 7  # a caller may use this many times what is then still free: by itself, seven eighths


class SharedCapacity:
    """A capacity in bytes or tokens, and how much of it each caller uses.

    A caller may use at most `FREE_MULTIPLE` times what is then still free, so part of the capacity is left for other
    callers, even if several use as much as they can: a caller that is over its share can add nothing until it has freed
    something. (Switches divide the memory for packets in this way: Choudhury and Hahne, "Dynamic queue length
    thresholds", 1998.) `EVERYONE` may use all of it. Not thread-safe.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._used_with_keys: Counter[str] = Counter()

    def fits(self, caller: str, amount: int) -> bool:
        """Whether the caller may use this much more."""
        if caller == EVERYONE:
            return self.used + amount <= self.capacity
        return self.used_by(caller) + amount <= self.allowed(caller)

    def allowed(self, caller: str) -> int:
        """How much the caller may use now, with what it uses already."""
        left = max(0, self.capacity - self.used + self.used_by(caller))
        return left if caller == EVERYONE else left * FREE_MULTIPLE // (FREE_MULTIPLE + 1)

    def used_by(self, caller: str) -> int:
        """How much the caller uses. `EVERYONE` uses what no caller with a key uses."""
        return self.used - self._used_with_keys.total() if caller == EVERYONE else self._used_with_keys[caller]

    def add(self, caller: str, amount: int) -> None:
        """Count what a caller begins to use, or, with a negative amount, frees."""
        self.used += amount
        if caller != EVERYONE:
            self._used_with_keys[caller] += amount
            if not self._used_with_keys[caller]:
                del self._used_with_keys[caller]  # callers come and go
