"""Runs batches whenever no request waits, and resumes them after a restart or the end of a worker.

The lines of a file run in order, a few at once, and their responses are written together. A journal has the part and
the size of each line that was written. If a worker ended while it wrote, what is not in the journal is cut off. Batches
take turns, so a long one does not delay the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from embedder.engine.callers import CALLER
from embedder.errors import (
    DeadlineExceeded,
    DeviceFailed,
    EmbedderError,
    NotFound,
    NotReady,
    Overloaded,
    ShuttingDown,
)
from embedder.http.batches.lines import Line, check_lines, raw_lines, read_line, response_line
from embedder.http.batches.store import FINAL, BatchStore, now
from embedder.http.error_forms import error_form
from embedder.settings import Settings

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between two looks for new batches
LINES_AT_ONCE = 16
LINES_PER_TURN = 50 * LINES_AT_ONCE  # of one batch, then the others have their turn
MAX_WAIT_S = 5.0  # for requests; then some lines run all the same, so that a busy service also finishes its batches
MAX_STARTS = 3  # without a line that is done: the lines there end the workers
MAX_TIMEOUTS = 3  # of a line
CLEAN_EVERY_S = 600.0

COUNTS = {"output": "completed", "errors": "failed"}  # part -> its name in OpenAI's counts

Respond = Callable[[str, Mapping[str, Any]], Awaitable[bytes]]
Result = TypeVar("Result")


class BatchRunner:
    """Runs the batches of a store in one worker.

    `respond` gives the body of a route's response to a body, or raises. `num_pending` is the number of tokens that wait
    or run in the engine. `is_stopping`: whether the worker drains.
    """

    def __init__(
        self,
        store: BatchStore,
        settings: Settings,
        *,
        respond: Respond,
        num_pending: Callable[[], int],
        is_stopping: Callable[[], bool],
    ) -> None:
        self.store = store
        self.settings = settings
        self.respond = respond
        self.num_pending = num_pending
        self.is_stopping = is_stopping
        # Once it has started, no limit on threads can keep a batch from going on, or let two writes overlap.
        self._thread = ThreadPoolExecutor(1, "batches")
        self._thread.submit(bool)

    async def run(self) -> None:
        """Run until the worker stops."""
        cleaned_s = float("-inf")
        while not self.is_stopping():
            unfinished: list[tuple[str, str]] = []
            try:
                if time.monotonic() - cleaned_s > CLEAN_EVERY_S:
                    await self._in_thread(self.store.remove_old)
                    cleaned_s = time.monotonic()
                unfinished = await self._in_thread(self.store.unfinished)
            except OSError as error:
                logger.error("the folder of batches cannot be used now, which is tried again: %s", error)
            turns = [await self._turn(*one) for one in unfinished]
            if not any(turns):
                await asyncio.sleep(POLL_S)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _turn(self, owner: str, identifier: str) -> bool:
        """Run some lines of a batch. False if another worker runs it, this one stops, or the disk fails."""
        CALLER.set(owner)
        try:
            with self.store.lock(owner, identifier) as is_free:
                return is_free and not self.is_stopping() and await self._run_some(owner, identifier)
        except OSError as error:
            logger.error("batch %s cannot go on now, which is tried again: %s", identifier, error)
            return False

    async def _run_some(self, owner: str, identifier: str) -> bool:
        """Run some lines of a batch while this worker holds its lock. Returns what `_turn` does; raises `OSError`."""
        try:
            batch = await self._in_thread(self.store.read_batch, owner, identifier)
        except NotFound:  # somebody has removed or damaged it
            await self._in_thread(self.store.remove_marks, owner, identifier)
            return True
        run = _BatchRun(self.store, self.settings, owner, batch)
        try:
            if await self._in_thread(run.begin):
                await self._run_lines(run)
        except (NotReady, ShuttingDown, DeviceFailed):
            run.end_turn()
            return False
        except (OSError, asyncio.CancelledError):
            with contextlib.suppress(OSError):
                run.end_turn()
            raise
        except EmbedderError as error:  # its input was removed, a limit was lowered, or the folder is full
            await self._in_thread(run.fail, error.code, error.message)
        except ValueError as error:
            logger.error("batch %s fails, because its files were changed: %s", identifier, error)
            await self._in_thread(run.fail, EmbedderError.code, "what the service has stored of the batch was damaged")
        except Exception:
            logger.exception("bug: batch %s fails", identifier)
            await self._in_thread(run.fail, EmbedderError.code, "internal error")
        else:
            await self._in_thread(run.end_turn)
        return True

    async def _run_lines(self, run: _BatchRun) -> None:
        for _ in range(LINES_PER_TURN // LINES_AT_ONCE):
            if self.is_stopping():
                return
            lines = await self._in_thread(run.next_lines)
            if not lines:
                return
            await self._wait_for_requests()
            results = await asyncio.gather(*(self._run_line(run.endpoint, line) for line in lines))
            await self._in_thread(run.write, results)

    async def _wait_for_requests(self) -> None:
        deadline_s = time.monotonic() + MAX_WAIT_S
        while self.num_pending() and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)

    async def _run_line(self, endpoint: str, line: Line) -> tuple[int, bytes]:
        """Status, and the line for the output or error file."""
        num_timeouts = 0
        identifier = os.urandom(12).hex()
        while True:
            try:
                body = await self.respond(endpoint, line.body)
            except Overloaded as error:
                await asyncio.sleep(min(error.retry_after_s, MAX_WAIT_S))
            except (NotReady, ShuttingDown, DeviceFailed):
                raise
            except EmbedderError as error:
                num_timeouts += isinstance(error, DeadlineExceeded)
                if not isinstance(error, DeadlineExceeded) or num_timeouts == MAX_TIMEOUTS:
                    return _failed(line, identifier, endpoint, error)
            except Exception:
                logger.exception("bug: the line %s of a batch failed", identifier)
                return _failed(line, identifier, endpoint, EmbedderError("internal error"))
            else:
                return 200, response_line(line, identifier, 200, body)


@dataclass
class _BatchRun:
    """One batch while this worker holds its lock. `num_done`: lines written. `lines`: those after them.

    Methods raise `OSError`, `ValueError` if a file was changed, and what `read_line` and the store's methods raise.
    """

    store: BatchStore
    settings: Settings
    owner: str
    batch: dict[str, Any]
    num_done: int = 0
    lines: Iterator[bytes] = field(default_factory=lambda: iter(()))

    def begin(self) -> bool:
        """Prepare to go on. False if the batch is finished, now or already."""
        batch = self.batch
        if batch["status"] in FINAL:  # the worker that finished it was killed at the end
            self.store.remove_marks(self.owner, batch["id"])
            return False
        if batch["status"] == "finalizing":
            self.store.finish(self.owner, batch, batch["_final"])
            return False
        if batch["status"] == "validating" and not self._validate():
            return False
        self._read_journal()
        self.lines = islice(raw_lines(self._input()), self.num_done, None)
        return self._may_start()

    @property
    def endpoint(self) -> str:
        return str(self.batch["endpoint"])

    def next_lines(self) -> list[Line]:
        """The next lines; none if the batch is finished, which is stored then."""
        batch = self.batch
        is_cancelled = self._path("cancel").exists()
        if is_cancelled or now() > batch["expires_at"]:
            self.store.finish(self.owner, batch, "cancelled" if is_cancelled else "expired")
            return []
        chosen = [read_line(line, self.endpoint, self.settings) for line in islice(self.lines, LINES_AT_ONCE)]
        if not chosen:
            self.store.finish(self.owner, batch, "completed")
        return chosen

    def write(self, results: Sequence[tuple[int, bytes]]) -> None:
        """Append the lines to their files, then to the journal, and store the counts."""
        self.store.check_space(sum(len(line) for _, line in results))
        parts = [(_part(status), line) for status, line in results]
        for part in COUNTS:
            if lines := [line for name, line in parts if name == part]:
                with self._path(part).open("ab") as file:
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())
        with self._path("journal").open("a", encoding="ascii") as journal:
            journal.writelines(f"{part} {len(line)}\n" for part, line in parts)
        self._count(part for part, _ in parts)
        self.store.save_batch(self.owner, self.batch)

    def _read_journal(self) -> None:
        """Count what is done, and cut off what the files have beyond it."""
        path = self._path("journal")
        path.touch()
        complete, _, _ = path.read_text(encoding="ascii").rpartition("\n")
        entries = [(part, int(size)) for part, size in (line.split() for line in complete.splitlines())]
        path.write_text("".join(f"{part} {size}\n" for part, size in entries), encoding="ascii")
        self.batch["request_counts"] |= dict.fromkeys(COUNTS.values(), 0)
        self._count(part for part, _ in entries)
        for part in COUNTS:
            with self._path(part).open("ab") as file:
                file.truncate(sum(size for name, size in entries if name == part))

    def _count(self, parts: Iterable[str]) -> None:
        for part in parts:
            self.batch["request_counts"][COUNTS[part]] += 1
            self.num_done += 1

    def end_turn(self) -> None:
        """End the turn, so that the next start does not count as one after a worker's death."""
        if self.batch["status"] not in FINAL:
            self.batch["_starts"] = 0
            self.store.save_batch(self.owner, self.batch)

    def _validate(self) -> bool:
        count, faults = check_lines(self._input(), self.endpoint, self.settings)
        self.batch["request_counts"]["total"] = count
        if faults:
            self._finish_as_failed(faults)
            return False
        self.batch |= {"status": "in_progress", "in_progress_at": now()}
        return True

    def _may_start(self) -> bool:
        """Count the starts without progress, and fail the batch after `MAX_STARTS` of them."""
        batch = self.batch
        is_same = batch.get("_done_at_start") == self.num_done
        batch |= {"_starts": batch.get("_starts", 0) + 1 if is_same else 1, "_done_at_start": self.num_done}
        if batch["_starts"] > MAX_STARTS:
            first, last = self.num_done + 1, self.num_done + LINES_AT_ONCE
            self.fail("worker_ended", f"the worker ended {MAX_STARTS} times at lines {first} to {last}")
            return False
        self.store.save_batch(self.owner, batch)
        return True

    def fail(self, code: str, message: str) -> None:
        """Finish the batch as failed, for this reason."""
        self._finish_as_failed([{"code": code, "message": message, "param": None, "line": None}])

    def _finish_as_failed(self, faults: list[dict[str, Any]]) -> None:
        self.batch["errors"] = {"object": "list", "data": faults}
        self.store.finish(self.owner, self.batch, "failed")

    def _input(self) -> Path:
        return self.store.content(self.owner, self.batch["input_file_id"])

    def _path(self, part: str) -> Path:
        return self.store.path(self.owner, self.batch["id"], part)


def _failed(line: Line, identifier: str, endpoint: str, error: EmbedderError) -> tuple[int, bytes]:
    """Status, and the line for the error file."""
    return error.status, response_line(line, identifier, error.status, error_form(endpoint).render(error))


def _part(status: int) -> str:
    return "output" if status == 200 else "errors"
