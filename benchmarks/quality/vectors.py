"""Store computed vectors in a folder, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.targets import Item, Target, name_of

PROBE: Item = {"text": "Which weights are these?"}
SAME_WEIGHTS = 0.999  # minimum cosine of the probe; bfloat16 in another batch stays above


class Vectors:
    """The vectors of a target, read from `folder` if they were computed before. `embed` writes each batch to disk.

    Raises `SystemExit` if the folder contains vectors of other weights or settings.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        folder.mkdir(parents=True, exist_ok=True)
        self._check_origin(folder / "origin.json")
        self._store = sqlite3.connect(folder / "vectors.sqlite")
        self._store.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")

    def embed(self, items: Sequence[Item], instruction: str | None) -> NDArray[np.float32]:
        """Vectors (num_items, hidden_size). Embeds only items that are not stored, and equal items once."""
        keys = [_key(item, instruction) for item in items]
        missing = {key: item for key, item in zip(keys, items, strict=True) if self._find(key) is None}
        if missing:
            rows = self.target.embed(list(missing.values()), instruction).astype("<f4")
            with self._store:
                pairs = zip(missing, (row.tobytes() for row in rows), strict=True)
                self._store.executemany("INSERT INTO vectors VALUES (?, ?)", pairs)
        return np.stack([np.frombuffer(self._find(key) or b"", "<f4") for key in keys])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._store.close()

    def _find(self, key: bytes) -> bytes | None:
        with closing(self._store.execute("SELECT vector FROM vectors WHERE key = ?", (key,))) as found:
            row = found.fetchone()
        return row and bytes(row[0])

    def _check_origin(self, path: Path) -> None:
        names = (
            "revision",
            "hidden_size",
            "default_instruction",
            "preprocessing",
            "raw_orientation",
            "pixels",
            "dtype",
        )
        about: dict[str, Any] = {"model": name_of(self.target.info), **{name: self.target.info[name] for name in names}}
        about["weights"] = self.target.info.get("weights", about["dtype"])  # missing in older services
        about["max_input_tokens"] = self.target.info["limits"]["max_input_tokens"]
        (probe,) = self.target.embed([PROBE])
        if not path.exists():
            path.write_text(json.dumps({**about, "probe": probe.tolist()}) + "\n", encoding="utf-8")
        origin = json.loads(path.read_text(encoding="utf-8"))
        origin.setdefault("weights", origin["dtype"])
        others = np.array(origin.pop("probe"), np.float32)
        if origin != about or others @ probe < SAME_WEIGHTS:
            raise SystemExit(
                f"{path.parent} contains results of other weights or settings: {origin}; current: {about}. "
                "Choose another --output, or delete that folder."
            )


def _key(item: Item, instruction: str | None) -> bytes:
    digest = hashlib.sha256(json.dumps([instruction, item.get("text")]).encode())
    digest.update(hashlib.sha256(item.get("image", b"")).digest())
    return digest.digest()
