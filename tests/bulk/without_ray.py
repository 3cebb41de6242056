"""The command of `embedder.bulk` with its worker in this process, for tests that do not need Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from embedder.bulk import __main__, command
from embedder.bulk.formats import Part
from embedder.bulk.worker import Job, Worker


def run_bulk(patch: pytest.MonkeyPatch, model: Path, *arguments: str | Path) -> tuple[int, list[str]]:
    """Run the command. Returns its exit status, and the names of the rows (or files) that were embedded."""
    embedded: list[str] = []

    def run(job: Job, parts: Sequence[Part], address: str | None) -> Iterator[dict[str, Any]]:
        with contextlib.closing(Worker(job)) as worker:
            for part in parts:
                embedded.extend(part.names or [f"{part.path}#{part.first_row + row}" for row in range(part.num_rows)])
                yield worker({"part": part.to_json()})

    patch.setattr(command, "_run", run)
    patch.setenv("EMBEDDER_MODEL", str(model))
    patch.setenv("EMBEDDER_DEVICE", "cpu")
    return __main__.main([str(one) for one in arguments]), embedded
