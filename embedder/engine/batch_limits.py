"""The token budget of a batch after an out-of-memory error.

Another program on the device may hold the memory, often briefly. So the limit shrinks at once and grows step by step.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

FITTING_BATCHES = 100  # that must fit before the limit is doubled


class BatchLimit:
    """The most tokens that a batch may have: `max_batch_tokens`, less after an out-of-memory error."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_tokens = max_batch_tokens
        self._max_batch_tokens = max_batch_tokens
        self._num_fitting = 0  # batches since the limit changed

    def shrink(self, num_tokens: int) -> None:
        """Limit batches to half of `num_tokens`, the size of a batch that did not fit."""
        self._num_fitting = 0
        if num_tokens // 2 < self.max_tokens:
            self.max_tokens = num_tokens // 2
            logger.warning("the device is out of memory: batches are limited to %d tokens for now", self.max_tokens)

    def grow(self) -> None:
        """Count a batch that fit. After `FITTING_BATCHES` of them, double the limit, up to `max_batch_tokens`."""
        self._num_fitting += 1
        if self.max_tokens < self._max_batch_tokens and self._num_fitting >= FITTING_BATCHES:
            self._num_fitting = 0
            self.max_tokens = min(2 * self.max_tokens, self._max_batch_tokens)
            logger.info("batches may have %d tokens again", self.max_tokens)
