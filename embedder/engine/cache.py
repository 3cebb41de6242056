"""Computed rows by content, within a limit of bytes.

The key is taken from the preprocessed ModelInput, so equal content has one key however it was sent. Full rows are kept:
cutting, normalizing and quantizing happen later and differ between callers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.inputs.preprocess import ModelInput

ENTRY_BYTES = 250  # of a key, an array header and a dictionary entry, in addition to the row's values


class VectorCache:
    """Rows by content key. Drops the least recently used row at `max_bytes`; with 0 it keeps none. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: OrderedDict[Hashable, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Hashable) -> NDArray[np.float32] | None:
        """The row, (hidden_size,) float32 and read-only, or None."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: Hashable, row: NDArray[np.float32]) -> None:
        """Keep a copy of the row, unless a value is not finite: that is an error of this item."""
        num_bytes = row.nbytes + ENTRY_BYTES
        if num_bytes > self.max_bytes or key in self._rows or not np.isfinite(row).all():
            return
        kept = row.copy()  # a view would keep the rows of the whole batch
        kept.flags.writeable = False
        self._rows[key] = kept
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.num_bytes -= dropped.nbytes + ENTRY_BYTES


def content_key(model_input: ModelInput) -> bytes:
    """Hash everything that the vector depends on: ids, positions, and each image's grid and pixels."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(repr((model_input.is_pair, model_input.num_prefix_patches)).encode() + model_input.prefix_key)
    arrays: list[NDArray[Any]] = [model_input.input_ids, model_input.position_ids, model_input.visual_index]
    for patches in model_input.patches[model_input.num_prefix_patches :]:
        arrays += [np.array((*patches.grid_thw, patches.num_frames)), patches.pixels]
    for array in arrays:
        digest.update(repr((array.dtype.str, array.shape)).encode())  # keeps the boundary between two arrays
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
