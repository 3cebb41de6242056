"""The priority of a request: one with a higher number lets others go first, for a limited time.

0 is the default, and no request can be ahead of that, because otherwise every caller could claim to be first. A request
with a higher number has a delay: half of `MAX_DELAY` for 1, two thirds for 2, three quarters for 3, and so on. Items of
requests with lower numbers that arrive within the delay go before its items. Once the request is older than its delay,
it is treated like the others. So its priority makes it wait at most twice its delay, whatever others send.
On an idle device it does not wait at all. Requests with the same priority share the device fairly.
"""

from __future__ import annotations

from embedder.engine.scheduler import NO_DELAY, Delay

MAX_DELAY = 0.125  # of a request's time limit
QUEUE_SHARE = 0.5  # of the queue: requests that let others go first may fill only this much of it


def delay_of(priority: int, request_timeout_s: float, now_s: float) -> Delay:
    """The delay of a request that arrives now; none for a priority below 1."""
    if priority < 1:
        return NO_DELAY
    seconds = MAX_DELAY * request_timeout_s * priority / (priority + 1)
    return Delay(seconds, now_s + seconds)
