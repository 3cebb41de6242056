"""A folder with documents: what is kept of them, the processes that open them, and the optional columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from benchmarks.demo_documents import write_documents
from embedder.settings import Settings
from tests.conftest import encoded
from tests.documents.hostile_pdfs import BAD_PAGES, GOOD, ODD, REFUSED

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

import pyarrow.parquet as pq

from embedder.bulk.source import Columns, Source
from embedder.bulk.worker import Job, Worker
from embedder.bulk.writer import STATE_FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "input"
    write_documents(folder, 2, 2)
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\n")
    (folder / "red.png").write_bytes(encoded(PIL.Image.new("RGB", (640, 320), "red")))
    (folder / "broken.png").write_bytes(encoded(PIL.Image.new("RGB", (64, 64)))[:60])
    return folder


def names(source: Source) -> list[str]:
    return [name for part in source.parts(100) for name in part.names]


def test_run_that_is_resumed_opens_only_documents_that_have_changed(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "out" / STATE_FOLDER
    first = Source(folder, Columns(), Settings(), state)
    expected = names(first)
    first.close()
    again = Source(folder, Columns(), Settings(), state)
    assert names(again) == expected
    assert again._pages._readers == []  # nothing was opened
    write_documents(tmp_path / "longer", 1, 3)
    (tmp_path / "longer" / "report-01.pdf").rename(folder / "report-01.pdf")
    assert len(names(again)) == len(expected) + 1
    again.close()
    (state / "pages.json").write_text("{ damaged")
    third = Source(folder, Columns(), Settings(), state)
    assert len(names(third)) == len(expected) + 1
    third.close()


def test_parts_of_a_thread_share_a_process(folder: Path) -> None:
    source = Source(folder, Columns(), Settings())
    parts = source.parts(1)
    assert len(parts) == 7
    assert sum(len(list(source.rows(part))) for part in parts) == 7
    (reader,) = source._pages._readers
    process = reader._process._process
    source.close()
    assert process is not None
    assert process.poll() is not None


def run(folder: Path, output: Path, checkpoint: Path, **options: Any) -> list[dict[str, Any]]:
    timeout_s = options.pop("decode_timeout_s", 60.0)
    settings = Settings(model=str(checkpoint), device="cpu", max_pixels=65536, decode_timeout_s=timeout_s)
    worker = Worker(Job(folder, output, "parquet", Columns(), None, "float32", settings, **options))
    worker.writer.state_folder.mkdir(parents=True, exist_ok=True)
    for part in worker.source.parts(1000):
        worker({"part": part.to_json()})
    worker.close()
    rows: list[dict[str, Any]] = pq.read_table(output / "part-0000000.parquet").to_pylist()
    return rows


@pytest.mark.slow  # some of the files hold a process until it is killed
def test_hostile_documents_cost_only_their_own_rows(tmp_path: Path, random_checkpoint: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    hostile = {**{name: data for name, (data, _) in REFUSED.items()}, **BAD_PAGES, **ODD}
    for number, (name, data) in enumerate(hostile.items()):
        (folder / f"{number:02}-{name}.pdf").write_bytes(data)
        (folder / f"{number:02}-zz-good.pdf").write_bytes(GOOD)
    rows = run(folder, tmp_path / "out", random_checkpoint, decode_timeout_s=3.0)
    good = [row for row in rows if row["id"].endswith("good.pdf#page=1")]
    assert len(good) == len(hostile)
    assert all(row["error"] is None for row in good)
    assert {row["id"].partition(".pdf")[0] for row in rows} == {path.stem for path in folder.iterdir()}
    assert {row["error"].partition(":")[0] for row in rows if row["error"]} == {"invalid_media", "media_too_large"}


def test_thumbnails_and_texts_are_columns_that_can_be_chosen(
    folder: Path, tmp_path: Path, random_checkpoint: Path
) -> None:
    rows = run(folder, tmp_path / "out", random_checkpoint, has_thumbnails=True, has_text=False)
    assert "text" not in rows[0]
    thumbnails = {row["id"]: row["thumbnail"] for row in rows}
    assert thumbnails["broken.pdf"] is thumbnails["broken.png"] is None
    page = PIL.Image.open(io.BytesIO(thumbnails["report-01.pdf#page=2"]))
    picture = PIL.Image.open(io.BytesIO(thumbnails["red.png"]))
    assert (page.size, picture.size) == ((256, 256), (352, 160))
    assert np.abs(np.array(picture.convert("RGB").getpixel((9, 9))) - [255, 0, 0]).max() < 4
    plain = run(folder, tmp_path / "plain", random_checkpoint)
    assert "thumbnail" not in plain[0]
    assert "Sales of" in plain[-1]["text"]
    for one, other in zip(rows, plain, strict=True):
        assert (one["id"], one["error"]) == (other["id"], other["error"])
        if not one["error"]:
            np.testing.assert_allclose(one["embedding"], other["embedding"], atol=1e-6)
