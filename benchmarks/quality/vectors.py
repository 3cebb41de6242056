"""Items that were embedded once -> their vectors, kept in a folder: a run that was ended goes on where it stopped."""

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
SAME_WEIGHTS = 0.999  # cosine of the probe; bfloat16 in another batch stays above


class Vectors:
    """A target's vectors, those of earlier runs from `folder`. Every batch is safe on disk when `embed` returns.

    Raises `SystemExit` where the folder holds vectors of other weights or other settings.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        folder.mkdir(parents=True, exist_ok=True)
        self._check_origin(folder / "origin.json")
        self._store = sqlite3.connect(folder / "vectors.sqlite")
        self._store.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")

    def embed(self, items: Sequence[Item], instruction: str | None) -> NDArray[np.float32]:
        """(num_items, hidden_size); only what is not there yet is embedded, a content that comes twice once."""
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
        names = ("revision", "hidden_size", "default_instruction", "pixels", "dtype")
        about: dict[str, Any] = {"model": name_of(self.target.info), **{name: self.target.info[name] for name in names}}
        about["max_input_tokens"] = self.target.info["limits"]["max_input_tokens"]
        (probe,) = self.target.embed([PROBE])
        if not path.exists():
            path.write_text(json.dumps({**about, "probe": probe.tolist()}) + "\n", encoding="utf-8")
        origin = json.loads(path.read_text(encoding="utf-8"))
        others = np.array(origin.pop("probe"), np.float32)
        if origin != about or others @ probe < SAME_WEIGHTS:
            raise SystemExit(
                f"{path.parent} holds results of other weights or settings ({origin}); these are {about}. "
                "Choose another --output, or remove that folder"
            )


def _key(item: Item, instruction: str | None) -> bytes:
    digest = hashlib.sha256(json.dumps([instruction, item.get("text")]).encode())
    digest.update(hashlib.sha256(item.get("image", b"")).digest())
    return digest.digest()
