"""The progress of the parts that are being embedded: from the workers, in small files, to the command that shows it.

The workers of a cluster share only the folder of the output with the command, so the counts go through that.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

REPORT_INTERVAL_S = 1.0
LINE_INTERVAL_S = 30.0  # where the output is no terminal
SUFFIX = ".progress"


class PartCounter:
    """Counts the rows of a part that are finished. Threads may share it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows = self.errors = 0
        self._lock = threading.Lock()

    def add(self, *, is_error: bool) -> None:
        """Count a row."""
        with self._lock:
            self.rows += 1
            self.errors += is_error


class Reporter:
    """Writes the counts of a worker's parts once a second, in a thread of its own. Close it at the end."""

    def __init__(self, state_folder: Path) -> None:
        self._folder = state_folder
        self._counters: dict[int, PartCounter] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def counting(self, number: int) -> Iterator[PartCounter]:
        """A counter, which is reported until the block ends."""
        counter = self._counters[number] = PartCounter(number)
        try:
            yield counter
        finally:
            del self._counters[number]

    def report(self) -> None:
        """Write the counts now. A disk that is full must not end the run here: the part's own write says so."""
        for counter in list(self._counters.values()):
            with contextlib.suppress(OSError):
                (self._folder / f"{counter.number}{SUFFIX}").write_text(f"{counter.rows} {counter.errors}")

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(REPORT_INTERVAL_S):
            self.report()


def read_counts(state_folder: Path) -> dict[int, tuple[int, int]]:
    """Number of a part -> its rows that are finished, and errors among them. Parts that are finished can be in it."""
    counts = {}
    for path in state_folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError, ValueError):  # it is being written
            rows, errors = path.read_text().split()
            counts[int(path.stem)] = int(rows), int(errors)
    return counts


class Progress:
    """Shows the rows that are done: as a bar in a terminal, otherwise in a line every half minute.

    `num_total` 0: not known. Use it in a `with` block.
    """

    def __init__(self, state_folder: Path, num_total: int, num_before: int, unit: str) -> None:
        self._folder = state_folder
        self._finished: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._num_before = num_before
        form = tqdm if sys.stderr.isatty() else _Lines
        self._shown = form(total=num_total or None, initial=num_before, unit=unit, smoothing=0.1)
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._shown.close()

    def finish(self, number: int, num_rows: int, num_errors: int) -> None:
        """Count a part that is finished, written or not."""
        with self._lock:
            self._finished[number] = num_rows, num_errors
        (self._folder / f"{number}{SUFFIX}").unlink(missing_ok=True)
        self.show()

    def write(self, line: str) -> None:
        """Print a line."""
        self._shown.write(line, file=sys.stderr)

    def show(self) -> None:
        """Read the workers' counts and show the sum."""
        with self._lock:
            counts = list((read_counts(self._folder) | self._finished).values())
            num_done = self._num_before + sum(rows for rows, _ in counts)
            self._shown.set_postfix(errors=sum(errors for _, errors in counts), refresh=False)
            self._shown.update(max(0, num_done - self._shown.n))  # less if a part is started again
            self._shown.refresh()

    def _watch(self) -> None:
        while not self._stop.wait(REPORT_INTERVAL_S):
            self.show()


class _Lines(tqdm):  # type: ignore[misc]  # tqdm is untyped
    """A tqdm that prints lines: a bar in a log is one line of thousands of characters."""

    def __init__(self, **options: Any) -> None:
        self._next_s = time.monotonic() + LINE_INTERVAL_S
        super().__init__(**options, file=io.StringIO(), mininterval=REPORT_INTERVAL_S, leave=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Called by tqdm where it would draw the bar."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LINE_INTERVAL_S
            print(self._line(), file=sys.stderr, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        """There is no bar to clear."""

    def _line(self) -> str:
        fields = self.format_dict
        rate = fields["rate"] or (self.n - self.initial) / max(fields["elapsed"], 1e-9)
        done = f"{self.n:,}" if self.total is None else f"{self.n:,} of {self.total:,}"
        left = f", {self.format_interval((self.total - self.n) / rate)} left" if self.total and rate else ""
        return f"{done} {self.unit}s, {rate:.2f} per second{left}, {self.postfix or 'errors=0'}"
