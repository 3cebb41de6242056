"""The progress of a download or a load in log lines; a bar would write hundreds of carriage returns between them."""

from __future__ import annotations

import io
import logging
import time
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class LoggedProgress(tqdm):  # type: ignore[misc]  # tqdm is untyped
    """A tqdm that writes a log line every `INTERVAL_S` seconds, and none for what is done sooner."""

    INTERVAL_S = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._logged_s = time.monotonic()
        super().__init__(
            *args,
            **kwargs | {"disable": False, "file": io.StringIO(), "leave": False, "mininterval": self.INTERVAL_S / 10},
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Called by tqdm where it would draw the bar."""
        now_s = time.monotonic()
        if self.total and now_s - self._logged_s >= self.INTERVAL_S:
            self._logged_s = now_s
            done, total = (self.format_sizeof(count) for count in (self.n, self.total))
            logger.info("%s: %s of %s %s", self.desc.rstrip(": ") or "progress", done, total, self.unit)
        return True

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to clear."""
