"""Content -> the row that it gave before, and who else waits for the same content. Pure bookkeeping, without a lock.

The key is taken of the ModelInput, behind preprocessing, so that the same content hits whatever way it came. Full rows
are kept: cutting, normalizing and quantizing come after, and differ between callers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedder.inputs.preprocess import ModelInput

Job = TypeVar("Job", bound=Hashable)

ENTRY_BYTES = 250  # of a key, an array's head and a place in the dictionary, beside the row's values


class VectorCache:
    """Rows by content key, the least recently used dropped first. With `max_bytes` of 0 it keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: OrderedDict[Hashable, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Hashable) -> NDArray[np.float32] | None:
        """(hidden_size,) float32, or None."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: Hashable, row: NDArray[np.float32]) -> None:
        """Keep a copy. A row with a value that is not finite is an error of the item's, and not kept."""
        size = row.nbytes + ENTRY_BYTES
        if size > self.max_bytes or key in self._rows or not np.isfinite(row).all():
            return
        kept = row.copy()  # a view would keep the rows of the whole batch
        kept.flags.writeable = False
        self._rows[key] = kept
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.num_bytes -= dropped.nbytes + ENTRY_BYTES


class Twins(Generic[Job]):
    """Jobs that wait for the same content. Each keeps its own place; the first to be computed answers all."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, dict[Job, None]] = {}
        self._running: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, key: Hashable, job: Job) -> bool:
        """The job waits. False if its content is being computed, so that it needs no place in the queue."""
        self._waiting.setdefault(key, {})[job] = None
        return key not in self._running

    def remove(self, key: Hashable, job: Job) -> None:
        """The job waits no longer, if it did."""
        jobs = self._waiting.get(key, {})
        jobs.pop(job, None)
        if not jobs:
            self._waiting.pop(key, None)

    def start(self, key: Hashable, job: Job) -> bool:
        """The job is to be computed, unless its content is already (False): then it waits on."""
        if key in self._running:
            return False
        self._running.add(key)
        self.remove(key, job)
        return True

    def is_awaited(self, key: Hashable) -> bool:
        """Somebody waits for the content, beside the job that is computed."""
        return key in self._waiting

    def finish(self, key: Hashable) -> list[Job]:
        """The content was computed, or failed: whoever waits for it."""
        self._running.discard(key)
        return list(self._waiting.pop(key, {}))


def content_key(model_input: ModelInput) -> bytes:
    """Hash of all that the vector depends on: ids, positions, and each picture's grid and pixels."""
    digest = hashlib.blake2b(digest_size=32)
    arrays: list[NDArray[Any]] = [model_input.input_ids, model_input.position_ids, model_input.visual_index]
    for patches in model_input.patches:
        arrays += [np.array((*patches.grid_thw, patches.num_frames)), patches.pixels]
    for array in arrays:
        digest.update(repr((array.dtype.str, array.shape)).encode())  # so that no two lists of arrays look the same
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
