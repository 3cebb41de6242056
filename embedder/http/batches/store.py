"""Files and batches on disk, in one folder that all workers share.

Each owner, a caller's API key, has a folder of its own:

    file-<id>.json                  what the API says about a file
    file-<id>.jsonl                 its content
    batch_<id>.json                 what the API says about a batch, and how often it was started
    batch_<id>.output, .errors      the lines written so far
    batch_<id>.journal              part and bytes of each of them, in the order of the input
    batch_<id>.open                 exists until the batch is finished
    batch_<id>.cancel               exists if the caller has cancelled the batch
    batch_<id>.lock                 locked by the worker that runs the batch; freed by the system when the worker ends

A JSON file is replaced as a whole, so that a reader never sees half of one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from embedder.errors import InvalidRequest, NotFound, RequestTooLarge

logger = logging.getLogger(__name__)

MAX_FILES = 1000  # per owner
FinalStatus = Literal["completed", "failed", "expired", "cancelled"]
FINAL: tuple[FinalStatus, ...] = ("completed", "failed", "expired", "cancelled")
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")


def check_folder(name: str) -> None:
    """Raise `ValueError` if this process could not make files in a folder, which need not exist. Makes nothing.

    `name`: the setting; empty: no folder.
    """
    if not name:
        return
    folder = Path(name)
    try:
        existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    except OSError as error:
        raise ValueError(f"EMBEDDER_BATCH_FOLDER={name!r} cannot be used: {error}") from error
    if not existing.is_dir():
        raise ValueError(f"EMBEDDER_BATCH_FOLDER={name!r} cannot be used: {existing} is not a folder")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"EMBEDDER_BATCH_FOLDER={name!r} cannot be used: {existing} cannot be written to")


class BatchStore:
    """Files and batches of all owners. Methods read and write the disk, so they are called in threads.

    `max_bytes`: limit on all files together. `retention_s`: files and finished batches are removed after it.
    """

    def __init__(self, folder: Path, max_bytes: int, retention_s: float) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.retention_s = retention_s

    # Files

    def add_file(self, owner: str, content: bytes, name: str) -> dict[str, Any]:
        """Store a file. Raises `RequestTooLarge` if the folder or the owner has too many."""
        self.check_space(len(content))
        if len(self._records(owner, "file-")) >= MAX_FILES:
            raise RequestTooLarge(f"{MAX_FILES} files are stored for this API key, the limit; delete some")
        identifier = f"file-{secrets.token_hex(12)}"
        path = self._owner_folder(owner) / f"{identifier}.jsonl"
        _write(path, content)
        return self._describe_file(owner, identifier, name, "batch")

    def check_space(self, num_bytes: int) -> None:
        """Raises `RequestTooLarge` if the folder has no space for so many bytes more."""
        stored = self.num_bytes()
        if stored + num_bytes > self.max_bytes:
            raise RequestTooLarge(
                f"the files of batches take {stored} bytes, and {num_bytes} more are needed; allowed: {self.max_bytes} "
                "(EMBEDDER_MAX_BATCH_BYTES). Delete some, or try again later"
            )

    def num_bytes(self) -> int:
        """Bytes of all files of all owners."""
        return sum(_size(path) for path in self.folder.glob("*/*"))

    def files(self, owner: str) -> list[dict[str, Any]]:
        """All files of an owner, the newest first."""
        return self._records(owner, "file-")

    def file(self, owner: str, identifier: str) -> dict[str, Any]:
        """One file. Raises `NotFound`."""
        return self._read(owner, identifier, "file-")

    def content(self, owner: str, identifier: str) -> Path:
        """The path of a file's content. Raises `NotFound`."""
        self.file(owner, identifier)
        return self._owner_folder(owner) / f"{identifier}.jsonl"

    def delete_file(self, owner: str, identifier: str) -> None:
        """Delete a file. Raises `NotFound`, and `InvalidRequest` for the input of a batch that is not finished."""
        with self._only_one(owner):
            self.file(owner, identifier)
            for batch in self.batches(owner):
                if batch["input_file_id"] == identifier and batch["status"] not in FINAL:
                    raise InvalidRequest(
                        f"{identifier} is the input of the batch {batch['id']}, which is {batch['status']}"
                    )
            for suffix in ("json", "jsonl"):
                (self._owner_folder(owner) / f"{identifier}.{suffix}").unlink(missing_ok=True)

    def _describe_file(self, owner: str, identifier: str, name: str, purpose: str) -> dict[str, Any]:
        path = self._owner_folder(owner) / f"{identifier}.jsonl"
        record = {
            "id": identifier,
            "object": "file",
            "bytes": path.stat().st_size,
            "created_at": now(),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        self._save(owner, record)
        return record

    # Batches

    def add_batch(
        self, owner: str, input_file_id: str, endpoint: str, window: str, window_s: int, metadata: Mapping[str, str]
    ) -> dict[str, Any]:
        """Store a batch, which a worker will find. Raises `NotFound` for an unknown file."""
        created_at = now()
        times = ("in_progress_at", "finalizing_at", "cancelling_at", *(f"{status}_at" for status in FINAL))
        batch = {
            "id": f"batch_{secrets.token_hex(12)}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file_id,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": created_at,
            "expires_at": created_at + window_s,
            **dict.fromkeys(times),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": dict(metadata) or None,
        }
        with self._only_one(owner):
            self.file(owner, input_file_id)
            if len(self._records(owner, "batch_")) >= MAX_FILES:
                raise RequestTooLarge(
                    f"{MAX_FILES} batches are stored for this API key, the limit; wait until some expire"
                )
            self._save(owner, batch)
            self.path(owner, str(batch["id"]), "open").touch()
        return batch

    def batches(self, owner: str) -> list[dict[str, Any]]:
        """All batches of an owner, the newest first."""
        return [self._with_cancelling(owner, batch) for batch in self._records(owner, "batch_")]

    def batch(self, owner: str, identifier: str) -> dict[str, Any]:
        """One batch, as the API shows it. Raises `NotFound`."""
        return self._with_cancelling(owner, self.read_batch(owner, identifier))

    def read_batch(self, owner: str, identifier: str) -> dict[str, Any]:
        """What is stored of a batch. Raises `NotFound`."""
        return self._read(owner, identifier, "batch_")

    def save_batch(self, owner: str, batch: Mapping[str, Any]) -> None:
        """Replace what is stored; for the worker that holds the lock."""
        self._save(owner, batch)

    def cancel(self, owner: str, identifier: str) -> dict[str, Any]:
        """Ask the worker that runs the batch to stop. Raises `NotFound`, and `InvalidRequest` if it is finished."""
        batch = self._read(owner, identifier, "batch_")
        if batch["status"] in FINAL:
            raise InvalidRequest(f"{identifier} is {batch['status']} and cannot be cancelled")
        self.path(owner, identifier, "cancel").touch()
        return self._with_cancelling(owner, batch)

    def _with_cancelling(self, owner: str, batch: dict[str, Any]) -> dict[str, Any]:
        mark = self.path(owner, batch["id"], "cancel")
        batch = {name: value for name, value in batch.items() if not name.startswith("_")}
        if batch["status"] in FINAL or not mark.exists():
            return batch
        return {**batch, "status": "cancelling", "cancelling_at": int(mark.stat().st_mtime)}

    def finish(self, owner: str, batch: dict[str, Any], status: FinalStatus) -> None:
        """Make files of the lines written so far, and store the batch's last state.

        A worker that ends in between leaves the status `finalizing`, and finishing once more has the same result; or it
        leaves the last status, with marks to remove.
        """
        if batch["status"] != "finalizing":
            batch |= {"status": "finalizing", "finalizing_at": now(), "_final": status}
            self._save(owner, batch)
        for part, key in (("output", "output_file_id"), ("errors", "error_file_id")):
            identifier = f"file-{batch['id'].removeprefix('batch_')[:-1]}{'0' if part == 'output' else '1'}"
            path, content = self.path(owner, batch["id"], part), self._owner_folder(owner) / f"{identifier}.jsonl"
            if _size(path):
                path.replace(content)
            path.unlink(missing_ok=True)
            if content.exists():
                batch[key] = self._describe_file(owner, identifier, f"{batch['id']}_{part}.jsonl", "batch_output")["id"]
        batch["status"] = batch["_final"]
        batch[f"{batch['status']}_at"] = now()
        self._save(owner, batch)
        self.remove_marks(owner, batch["id"])

    def remove_marks(self, owner: str, identifier: str) -> None:
        """Remove what only a batch that is not finished has."""
        for part in ("journal", "cancel", "lock", "open"):
            self.path(owner, identifier, part).unlink(missing_ok=True)

    def unfinished(self) -> list[tuple[str, str]]:
        """Owner and id of each batch that is not finished, the oldest first."""
        marks = [(_changed_s(mark), mark) for mark in self.folder.glob("*/batch_*.open")]
        return [(mark.parent.name, mark.stem) for _, mark in sorted(marks)]

    @contextmanager
    def lock(self, owner: str, identifier: str) -> Iterator[bool]:
        """Yield whether this worker may run the batch in the block: False if another one does."""
        with self.path(owner, identifier, "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True  # the file is closed after it, which frees the lock

    def path(self, owner: str, identifier: str, part: str) -> Path:
        """The path of one part of a batch."""
        return self._owner_folder(owner) / f"{identifier}.{part}"

    def remove_old(self) -> None:
        """Remove files and finished batches that are older than `retention_s`, and old files that belong to none."""
        oldest = now() - self.retention_s
        for folder in self.folder.glob("*/"):
            with self._only_one(folder.name):
                batches, files = (self._records(folder.name, prefix) for prefix in ("batch_", "file-"))
                unfinished = [one for one in batches if one["status"] not in FINAL]
                needed = {one[key] for one in unfinished for key in ("id", "input_file_id")}
                created_at = {one["id"]: one["created_at"] for one in (*batches, *files)}
                for path in folder.iterdir():
                    identifier = path.name.partition(".")[0]
                    if created_at.get(identifier, _changed_s(path)) < oldest and identifier not in needed:
                        path.unlink(missing_ok=True)

    @contextmanager
    def _only_one(self, owner: str) -> Iterator[None]:
        """Wait until no other worker or thread is in such a block for this owner."""
        folder = os.open(self._owner_folder(owner), os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _owner_folder(self, owner: str) -> Path:
        folder = self.folder / owner
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def _records(self, owner: str, prefix: str) -> list[dict[str, Any]]:
        paths = self._owner_folder(owner).glob(f"{prefix}*.json")
        records = [record for path in paths if (record := _load(path)) is not None]
        return sorted(records, key=lambda record: (record["created_at"], record["id"]), reverse=True)

    def _read(self, owner: str, identifier: str, prefix: str) -> dict[str, Any]:
        is_id = identifier.startswith(prefix) and _ID.fullmatch(identifier)
        record = _load(self._owner_folder(owner) / f"{identifier}.json") if is_id else None
        if record is None:
            raise NotFound(f"there is no {prefix.strip('-_')} {identifier[:60]!r} of this API key")
        return record

    def _save(self, owner: str, record: Mapping[str, Any]) -> None:
        _write(self._owner_folder(owner) / f"{record['id']}.json", json.dumps(record).encode())


def now() -> int:
    """Seconds since 1970, as in OpenAI's objects: these times outlast a restart."""
    return int(time.time())


def _write(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if not path.exists():  # it would be empty after a power failure; file systems protect one that is replaced
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:  # removed meanwhile
        return None
    except ValueError:
        logger.error("%s is damaged, and counts as removed", path)
        return None
    return record


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # finished meanwhile
        return 0.0


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
