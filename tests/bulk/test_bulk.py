"""`python -m embedder.bulk`: what is read, what is written, and that every row is written exactly once after a kill."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder import Embedder
from embedder.engine.postprocess import quantize
from embedder.errors import EngineFailed
from embedder.settings import Settings
from tests.bulk.interrupted import run_and_kill
from tests.conftest import ROOT, encoded, picture, words

pytest.importorskip("lance", reason="comes with the `bulk` extra")

import lance
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from embedder.bulk import formats
from embedder.bulk.__main__ import main
from embedder.bulk.source import Columns, Source
from embedder.bulk.worker import Job, Worker, share_resources
from embedder.bulk.writer import Writer, output_schema

PNGS = [encoded(picture(40 + 8 * index, 48, index)) for index in range(3)]
# The same rows in every format: texts, images, both. A folder has only the images.
ROWS: list[dict[str, Any]] = [
    {"text": "red"},
    {"image": PNGS[0]},
    {"text": "green", "image": PNGS[1]},
    {"image": PNGS[2]},
    {"text": "blue"},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n\n")  # blank lines are no rows
    return path


def as_parquet(folder: Path) -> Path:
    pq.write_table(
        pa.Table.from_pylist(ROWS[:2], schema=pa.schema({"text": pa.string(), "image": pa.binary()})),
        folder / "a.parquet",
    )
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{**row, "image": {"bytes": row["image"], "path": None} if "image" in row else None} for row in ROWS[2:]]
    table = pa.Table.from_pylist(rows, schema=pa.schema({"text": pa.large_string(), "image": struct}))
    pq.write_table(table, folder / "b.parquet", row_group_size=2)
    return folder


def as_jsonl(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    rows = []
    for index, row in enumerate(ROWS):
        if "image" in row and index % 2:  # by its path, the others in base64
            (folder / "pictures" / f"{index}.png").write_bytes(row["image"])
            rows.append({**row, "image": f"pictures/{index}.png"})
        else:
            rows.append({**row, "image": base64.b64encode(row["image"]).decode()} if "image" in row else row)
    write_jsonl(folder / "a.jsonl", rows[:4])
    write_jsonl(folder / "b.jsonl", rows[4:])
    return folder


def as_tar(folder: Path) -> Path:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for index, row in enumerate(ROWS):
            for column, data in row.items():
                member = tarfile.TarInfo(f"some/{index:03}.{'png' if column == 'image' else 'txt'}")
                content = data if isinstance(data, bytes) else data.encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "shard.tar"


def as_folder(folder: Path) -> Path:
    (folder / "inner").mkdir()
    for index, row in enumerate(ROWS):
        if "image" in row:
            (folder / "inner" / f"{index}.PNG").write_bytes(row["image"])
    return folder


NAMES = {
    as_parquet: ["a.parquet#0", "a.parquet#1", "b.parquet#0", "b.parquet#1", "b.parquet#2"],
    as_jsonl: ["a.jsonl#0", "a.jsonl#1", "a.jsonl#2", "a.jsonl#3", "b.jsonl#0"],
    as_tar: ["some/000", "some/001", "some/002", "some/003", "some/004"],
    as_folder: ["inner/1.PNG", "inner/2.PNG", "inner/3.PNG"],
}


@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 100])
@pytest.mark.parametrize("write", NAMES, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_rows_in_order_for_every_part_size(
    write: Any, rows_per_part: int, tmp_path: Path
) -> None:
    source = Source(write(tmp_path), Columns(), Settings())
    parts = source.parts(rows_per_part)
    rows = [row for part in parts for row in source.rows(formats.Part.from_json(part.to_json()))]
    assert [row.id for row in rows] == NAMES[write]
    expected = [{"image": row["image"]} for row in ROWS if "image" in row] if write is as_folder else ROWS
    found: list[Any] = [
        {**row.fields, "image": base64.b64decode(row.fields["image"])}
        if isinstance(row.fields, dict) and isinstance(row.fields.get("image"), str)
        else row.fields
        for row in rows
    ]
    assert found == expected


def test_named_columns_are_read(tmp_path: Path) -> None:
    row = {"title": "red", "task": "Find it.", "key": 7, "image": "not read"}
    source = Source(
        write_jsonl(tmp_path / "a.jsonl", [row]), Columns("title", instruction="task", id="key"), Settings()
    )
    (found,) = source.rows(source.parts(10)[0])
    assert (found.id, found.fields) == ("7", {"text": "red", "instruction": "Find it."})
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert Source(tmp_path / "a.parquet", Columns("title", id="key"), Settings()).id_type == pa.int64()
    with pytest.raises(ValueError, match=r"^a\.parquet has no column titel; its columns: image, key, task, title$"):
        Source(tmp_path / "a.parquet", Columns("titel"), Settings())


def test_missing_column_of_jsonl_is_named_with_the_columns_that_exist(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["not JSON", {"title": "red"}, {"title": "blue", "key": 7}])
    with pytest.raises(ValueError, match=r"^the input has no column titel; its columns: key, title$"):
        Source(path, Columns("titel"), Settings())
    with pytest.raises(ValueError, match=r"^the input has no column text, image or video; its columns: key, title$"):
        Source(path, Columns(), Settings())
    for columns in (Columns("title"), Columns("title", id="key")):  # the second row has no key
        source = Source(path, columns, Settings())
        assert len(list(source.rows(source.parts(10)[0]))) == 3


def test_column_of_content_that_a_folder_of_images_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^a folder of pictures and clips has no column title; its columns: image, video$"
    ):
        Source(as_folder(tmp_path), Columns("title"), Settings())


def test_files_that_are_left_out_are_counted_by_suffix(tmp_path: Path) -> None:
    folder = as_folder(tmp_path)
    for name in ("a.txt", "inner/b.TXT", "c.jxl", "README"):
        (folder / name).write_text("not an image")
    assert Source(folder, Columns(), Settings()).num_left_out == {".txt": 2, ".jxl": 1, "": 1}
    assert Source(write_jsonl(folder / "d.jsonl", [{"text": "a"}]), Columns(), Settings()).num_left_out == {}


BAD_ROWS = {
    '{"text": "cut off': "not valid JSON",
    "[1]": "not a JSON object",
    '{"text": 5}': "text: got 5",
    '{"other": "red"}': "at least one of text, image or video",
    '{"image": 5}': "image: got 5 (a number)",
    '{"image": "/etc/host.png"}': "absolute or has '..'",
    '{"image": "../secret.png"}': "absolute or has '..'",
    '{"image": "inner/../../secret.png"}': "absolute or has '..'",
    '{"image": "out.png"}': "leads outside",
    '{"image": "round.png"}': "cannot be read",
    '{"image": "inner.d"}': "leads outside or to no file",
    '{"image": "missing.png"}': "cannot be read: FileNotFoundError",
    '{"image": "nul\\u0000.png"}': "cannot be read: ValueError",
    '{"image": "long.png"}': "file of 2000 bytes; allowed: up to 1000",
    '{"image": "http://localhost/a.png"}': "URL",
    '{"image": "a.txt"}': "HEIC file (starts with 'hello')",
    '{"image": "!"}': "not valid base64",
    '{"text": "' + "x" * 3000 + '"}': "line of more than 2500 bytes",
}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JSONL of the rows above, each followed by a good one, with the files that their paths name."""
    folder = tmp_path / "data"
    (folder / "inner.d").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(PNGS[0])
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    (folder / "long.png").write_bytes(b"\x89PNG" * 500)
    (folder / "a.txt").write_bytes(b"hello")
    monkeypatch.setattr(formats, "MAX_ROW_BYTES", 2500)
    return write_jsonl(folder / "a.jsonl", [line for bad in BAD_ROWS for line in (bad, '{"text": "red"}')])


def job(path: Path, output: Path, model: Path, **options: Any) -> Job:
    (output / "_bulk").mkdir(parents=True)
    settings = Settings(model=str(model), device="cpu", max_image_bytes=options.pop("max_image_bytes", 2**20))
    fields = {"output_format": "parquet", "columns": Columns(), "dimensions": None, "output_dtype": "float32"}
    return Job(input=path, output=output, settings=settings, **{**fields, **options})


def run(task: Job, rows_per_part: int = 10) -> tuple[list[dict[str, Any]], pa.Table]:
    """Embed all parts with one worker, without Ray: its counts, and the output."""
    worker = Worker(task)
    parts = worker.source.parts(rows_per_part)
    counts = [worker({"part": part.to_json()}) for part in reversed(parts)]
    worker.writer.commit(worker.schema, [part.number for part in parts])
    worker.close()
    return counts, read(task.output, task.output_format)


def read(output: Path, output_format: str = "parquet") -> pa.Table:
    if output_format == "lance":
        return lance.dataset(str(output)).to_table()
    return pyarrow.dataset.dataset(output).to_table()


def test_bad_row_has_its_error_and_other_rows_their_vectors(
    hostile: Path, tmp_path: Path, random_checkpoint: Path
) -> None:
    counts, table = run(job(hostile, tmp_path / "out", random_checkpoint, max_image_bytes=1000), 7)
    rows = table.to_pylist()
    assert len(rows) == 2 * len(BAD_ROWS)
    assert sum(one["errors"] for one in counts) == len(BAD_ROWS)
    for row, reason in zip(rows[::2], BAD_ROWS.values(), strict=True):
        assert reason in row["error"]
        assert row["embedding"] is row["num_tokens"] is None
    for row in rows[1::2]:
        assert row["error"] is None
        np.testing.assert_allclose(row["embedding"], rows[1]["embedding"], atol=1e-6)


@pytest.mark.parametrize("output_format", ["parquet", "lance"])
@pytest.mark.parametrize(
    ("output_dtype", "dimensions"), [("float32", None), ("float16", 64), ("int8", 64), ("ubinary", 100)]
)
def test_vectors_are_the_librarys(
    output_format: str, output_dtype: Any, dimensions: int | None, tmp_path: Path, embedder: Embedder
) -> None:
    (tmp_path / "in").mkdir()
    path = as_parquet(tmp_path / "in")
    model = embedder.checkpoint.folder
    options = {"output_format": output_format, "output_dtype": output_dtype, "dimensions": dimensions}
    _, table = run(job(path, tmp_path / "out", model, **options), 2)
    vectors = embedder.embed(ROWS, dimensions=dimensions)
    expected = np.stack([quantize(vector, output_dtype) for vector in vectors])
    found = np.array(table["embedding"].to_pylist(), expected.dtype)
    assert table.schema.equals(output_schema(pa.string(), dimensions or embedder.engine.hidden_size, output_dtype))
    assert table["id"].to_pylist() == NAMES[as_parquet]
    is_float = output_dtype in ("float32", "float16")
    np.testing.assert_allclose(
        found.astype(float), expected.astype(float), atol=1e-6 if output_dtype == "float32" else 1e-3 if is_float else 1
    )


def test_broken_file_fails_only_its_own_parts(tmp_path: Path, random_checkpoint: Path) -> None:
    (tmp_path / "in").mkdir()
    path = as_tar(tmp_path / "in").parent
    (path / "broken.tar").write_bytes((path / "shard.tar").read_bytes()[:3000])
    (path / "other.tar").write_bytes(b"no tar at all" * 100)
    counts, table = run(job(path, tmp_path / "out", random_checkpoint))
    assert ["ReadError" in one["fault"] for one in counts] == [False, True, True]
    assert table["id"].to_pylist() == NAMES[as_tar]


def test_part_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pylist([], schema=schema)
        raise OSError("the disk is full")

    schema = output_schema(pa.string(), 64, "float32")
    (tmp_path / "_bulk").mkdir()
    writer = Writer(tmp_path, "parquet")
    with pytest.raises(OSError, match="full"):
        writer.write(0, schema, batches())
    assert not writer.is_written(0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_engine_that_fails_for_every_input_fails_the_part(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(job(write_jsonl(tmp_path / "a.jsonl", ROWS[:1]), tmp_path / "out", random_checkpoint))

    def lost(_: object) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(worker.embedder.engine._device, "_launch", lost)
    with pytest.raises(EngineFailed):
        worker({"part": worker.source.parts(10)[0].to_json()})
    assert not worker.writer.is_written(0)
    worker.close()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dimensions", "5000"], "dimensions: got 5000"),
        (["--text", "titel", "--rows-per-part", "0"], "--rows-per-part: got 0; allowed: 1 and more"),
        (["--text", "titel"], "the input has no column titel; its columns: text"),
        (["--format", "lance"], "started with another value of format"),
        (["--dimensions", "64", "--rows-per-part", "1"], "started with another value of dimensions"),
    ],
)
def test_wrong_arguments_are_refused_before_ray_starts(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write_jsonl(tmp_path / "a.jsonl", ROWS[:1] * 2), tmp_path / "out"
    start(path, output)
    with pytest.raises(SystemExit, match="2"):
        main([str(path), str(output), *arguments])
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [("", "int8"), ("int8", ""), ("int8", "fp8")])
def test_output_is_not_continued_with_weights_of_another_format(
    before: str, after: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = write_jsonl(tmp_path / "a.jsonl", ROWS[:1] * 2), tmp_path / "out"
    monkeypatch.setenv("EMBEDDER_WEIGHTS", before)
    start(path, output)
    monkeypatch.setenv("EMBEDDER_WEIGHTS", after)
    with pytest.raises(SystemExit, match="2"):
        main([str(path), str(output)])
    assert "the output was started with another value of weights (see " in capsys.readouterr().err
    monkeypatch.setenv("EMBEDDER_WEIGHTS", before)
    assert main([str(path), str(output)]) == 0


def test_output_of_a_version_without_the_setting_is_continued_without_it_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = write_jsonl(tmp_path / "a.jsonl", ROWS[:1] * 2), tmp_path / "out"
    start(path, output)
    (options,) = output.rglob("job.json")
    written = json.loads(options.read_text())
    del written["weights"]
    options.write_text(json.dumps(written))
    assert main([str(path), str(output)]) == 0
    options.write_text(json.dumps(written))
    monkeypatch.setenv("EMBEDDER_WEIGHTS", "int8")
    with pytest.raises(SystemExit, match="2"):
        main([str(path), str(output)])
    assert "started with another value of weights" in capsys.readouterr().err


def start(path: Path, output: Path, errors: Sequence[str | None] = (None,)) -> int:
    """A run that finds its only part written, with these errors."""
    output.mkdir()
    schema = output_schema(pa.string(), 2, "float32")
    rows = [{"id": "a", "error": error, "embedding": None if error else [0.0, 1.0]} for error in errors]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), output / "part-0000000.parquet")
    return main([str(path), str(output)])


@pytest.mark.parametrize(("errors", "status"), [([None, None], 0), ([None, "invalid_media: x"], 3)])
def test_exit_status_says_whether_rows_have_errors(errors: list[str | None], status: int, tmp_path: Path) -> None:
    assert start(write_jsonl(tmp_path / "a.jsonl", ROWS[:1] * 2), tmp_path / "out", errors) == status


def test_files_left_out_are_reported_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ROWS[:1])
    for name in ("a.txt", "b.txt", "c.jxl", "README"):
        (tmp_path / "in" / name).touch()
    assert start(tmp_path / "in", tmp_path / "out") == 0
    assert "left out: 1 without suffix, 2 .txt, 1 .jxl\n" in capsys.readouterr().err


@pytest.mark.parametrize("output_format", ["parquet", "lance"])
def test_rows_with_errors_are_counted_in_the_whole_output(
    output_format: str, tmp_path: Path, random_checkpoint: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "red"}, {"text": 5}, {"text": "green"}, {"text": ""}])
    task = job(path, tmp_path / "out", random_checkpoint, output_format=output_format)
    run(task, 2)
    assert Writer(task.output, task.output_format).count_errors([0, 1]) == {"invalid_request": 2}


def test_two_runs_do_not_write_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write_jsonl(tmp_path / "a.jsonl", ROWS[:1]), tmp_path / "out"
    start(path, output)
    with (output / "_bulk" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="2"):
            main([str(path), str(output)])
    assert "another run is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workers", "gpus", "cpus", "expected"),
    [
        ({}, 0, [16], (1, {"num_cpus": 16})),
        ({"workers": 3}, 0, [16], (3, {"num_cpus": 5})),
        ({"workers": 4}, 0, [2], (4, {"num_cpus": 0.5})),
        ({}, 0, [16, 8], (2, {"num_cpus": 8})),  # a cluster
        ({}, 8, [96], (8, {"num_gpus": 1, "num_cpus": 1})),
        ({"workers": 16}, 8, [96], (16, {"num_gpus": 0.5, "num_cpus": 1})),
        ({"workers": 3}, 2, [2], (3, {"num_gpus": 0.5, "num_cpus": 2 / 3})),
        ({"device": "cpu"}, 0, [4], (1, {"num_cpus": 4})),
    ],
)
def test_resources_are_divided_among_the_workers(workers: Any, gpus: int, cpus: list[int], expected: Any) -> None:
    assert share_resources(Settings(**workers), gpus, cpus) == expected


def test_resumed_run_writes_only_the_missing_parts(tmp_path: Path, embedder: Embedder) -> None:
    texts = [words(5, seed) for seed in range(10)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    task = job(path, tmp_path / "out", embedder.checkpoint.folder)
    worker = Worker(task)
    parts = worker.source.parts(2)
    for part in (parts[0], parts[3]):
        worker({"part": part.to_json()})
    (worker.writer.state_folder / "1.killed.tmp").write_bytes(b"PAR1")
    before = {one.name: one.stat().st_mtime_ns for one in task.output.glob("*.parquet")}
    worker.writer.remove_unfinished()
    missing = [part for part in parts if not worker.writer.is_written(part.number)]
    assert [part.number for part in missing] == [1, 2, 4]
    for part in missing:
        worker({"part": part.to_json()})
    worker.close()
    after = {one.name: one.stat().st_mtime_ns for one in task.output.glob("*.parquet")}
    assert len(after) == 5
    assert before.items() <= after.items()
    assert not list(worker.writer.state_folder.glob("*.tmp"))
    table = read(task.output)
    assert table["id"].to_pylist() == [f"a.jsonl#{number}" for number in range(10)]
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), np.stack(embedder.embed(texts)), atol=1e-6)


@pytest.mark.slow  # Ray starts twice; the test above checks resuming without Ray
@pytest.mark.timeout(900)
def test_every_row_is_written_once_after_a_kill(tmp_path: Path, embedder: Embedder) -> None:
    """SIGKILL in the middle, then the same command again, with two workers."""
    texts = [words(100, seed) for seed in range(300)]
    path, output = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tmp_path / "out"
    command = [sys.executable, "-m", "embedder.bulk", str(path), str(output), "--rows-per-part", "5"]
    environment = {**os.environ, "EMBEDDER_MODEL": str(embedder.checkpoint.folder), "EMBEDDER_WORKERS": "2"}
    environment["EMBEDDER_DTYPE"] = "float32"  # as `embedder` computes
    run_and_kill(command, environment, output, 5)
    before = {one.name: one.stat().st_mtime_ns for one in output.glob("*.parquet")}
    assert 5 <= len(before) < 60
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    chatter = re.findall(
        r"^.*(?:streaming_executor|Ray instance|Progress bars disabled).*$", again.stderr, re.MULTILINE
    )
    assert chatter == [], "Ray reports its steps between the lines of the progress bar"
    after = {one.name: one.stat().st_mtime_ns for one in output.glob("*.parquet")}
    assert len(after) == 60
    assert not list((output / "_bulk").glob("*.tmp"))
    table = read(output)
    assert table["id"].to_pylist() == [f"a.jsonl#{number}" for number in range(300)]
    assert table["error"].null_count == 300
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), np.stack(embedder.embed(texts)), atol=1e-6)
