"""A folder of 1,500 files of all kinds, some unknown and some broken: killed half way, resumed, each row once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from benchmarks.demo_documents import make_pdf, text
from tests.bulk.interrupted import run_and_kill
from tests.conftest import ROOT, encoded, picture
from tests.inputs.test_video import clip

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

import pyarrow.dataset

pytestmark = pytest.mark.slow

NUM_PICTURES, NUM_PDFS, NUM_TIFFS, NUM_CLIPS, NUM_BROKEN, NUM_UNKNOWN = 1100, 90, 70, 40, 100, 100


def write_files(folder: Path) -> tuple[set[str], set[str]]:
    """Write the files. Returns the ids of the rows with a vector, and of those with an error."""
    good, bad = set(), set()
    formats = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "BMP"), ("GIF", "gif")]
    folder.mkdir()
    for kind in "abc":
        (folder / kind).mkdir()

    def write(number: int, name: str, data: bytes) -> str:
        path = f"{'abc'[number % 3]}/{number:03}-{name}"
        (folder / path).write_bytes(data)
        return path

    for number in range(NUM_PICTURES):
        file_format, suffix = formats[number % len(formats)]
        good.add(write(number, f"picture.{suffix}", encoded(picture(32, 40, number), file_format)))
    page = PIL.Image.new("RGB", (2, 2))
    for number in range(NUM_PDFS):
        name = write(number, "report.pdf", make_pdf([(text(5, 50, 12, f"page {number}"), page)] * 2))
        good |= {f"{name}#page=1", f"{name}#page=2"}
    for number in range(NUM_TIFFS):
        file = io.BytesIO()
        picture(40, 32, number).save(file, "TIFF", save_all=True, append_images=[picture(32, 32, number)])
        name = write(number, "scan.tif", file.getvalue())
        good |= {f"{name}#page=1", f"{name}#page=2"}
    video = clip(num_frames=4)
    good |= {write(number, "clip.mp4", video) for number in range(NUM_CLIPS)}
    whole = {
        "png": encoded(picture(32, 40)),
        "pdf": b"%PDF-1.7\nnothing",
        "tiff": b"II*\0\xff\xff\xff\xff",
        "mp4": video,
    }
    for number in range(NUM_BROKEN):
        suffix = list(whole)[number % len(whole)]
        bad.add(write(number, f"broken.{suffix}", whole[suffix][: len(whole[suffix]) * 2 // 3]))
    for number in range(NUM_UNKNOWN):
        write(number, f"notes.{('txt', 'jxl', 'zip')[number % 3]}", b"not embedded")
    return good, bad


@pytest.mark.timeout(600)
def test_1500_mixed_files_are_embedded_once_after_a_kill(tmp_path: Path, random_checkpoint: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    good, bad = write_files(folder)
    assert sum(path.is_file() for path in folder.rglob("*")) == 1500
    command = [sys.executable, "-m", "embedder.bulk", str(folder), str(output), "--dimensions", "64"]
    environment = {**os.environ, "EMBEDDER_MODEL": str(random_checkpoint), "EMBEDDER_MAX_PIXELS": "16384"}
    run_and_kill(command, environment, output, 45)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 45 <= len(before) < 90
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 3, again.stderr
    assert "left out: 34 .txt, 33 .jxl, 33 .zip\n" in again.stderr
    assert "rows of the output with an error: 100 invalid_media\n" in again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert before.items() <= after.items()
    rows = pyarrow.dataset.dataset(output).to_table().to_pylist()
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids))
    assert {row["id"] for row in rows if row["error"] is None} == good
    assert {row["id"] for row in rows if row["error"] is not None} == bad
    assert np.isfinite([row["embedding"] for row in rows if row["embedding"]]).all()
