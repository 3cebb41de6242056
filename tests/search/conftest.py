"""A small collection: what `embedder.bulk` makes of it, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest

from benchmarks.demo_documents import write_documents


@dataclass
class Indexed:
    """The input, the output, and the subject of each page of each report."""

    folder: Path
    output: Path
    subjects: list[list[str]]


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """Two reports of four pages, a picture and a broken PDF, embedded by the bundled model without Ray."""
    base = tmp_path_factory.mktemp("search")
    folder, output = base / "documents", base / "vectors"
    subjects = write_documents(folder / "reports", 2, 4)
    PIL.Image.new("RGB", (96, 96), "red").save(folder / "red.png")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\n")
    embed_with_the_bundled_model(folder, output, rows_per_part=3)
    return Indexed(folder, output, subjects)


def embed_with_the_bundled_model(source: Path, output: Path, rows_per_part: int) -> None:
    """What `embedder.bulk` does, without Ray."""
    pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")
    from embedder.bulk.source import Columns
    from embedder.bulk.state import start
    from embedder.bulk.worker import Job, Worker
    from embedder.bulk.writer import STATE_FOLDER
    from embedder.model.checkpoint import find_checkpoint
    from embedder.settings import Settings

    job = Job(source, output, "parquet", Columns(), None, "float32", Settings(device="cpu"))
    worker = Worker(job)
    (output / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
    for part in start(job, find_checkpoint(job.settings), worker.source, worker.writer, rows_per_part).parts:
        worker({"part": part.to_json()})
    worker.close()
