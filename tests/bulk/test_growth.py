"""A second run over the same output: what was added or changed is embedded, and what was removed is taken out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from benchmarks.demo_documents import write_documents
from tests.conftest import encoded, picture

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

import lance
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from embedder.bulk import plan as plan_module
from embedder.bulk.writer import Writer
from tests.bulk.without_ray import run_bulk


def vectors(output: Path, output_format: str = "parquet") -> dict[str, Any]:
    """Id -> vector, or the error's code. Fails if a row is there twice."""
    opened = lance.dataset(str(output)) if output_format == "lance" else pyarrow.dataset.dataset(output)
    rows = opened.to_table().to_pylist()
    found = {row["id"]: row["embedding"] or row["error"].partition(":")[0] for row in rows}
    assert len(found) == len(rows)
    return found


def touch(path: Path) -> None:
    """Give the file another time of change, whatever the clock's resolution."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def pictures(folder: Path, num_pages: int) -> Path:
    """Six pictures, a broken one, and a report if it has pages."""
    folder.mkdir()
    if num_pages:
        write_documents(folder, 1, num_pages)
    for index in range(6):
        (folder / f"{index}.png").write_bytes(encoded(picture(40, 48, index)))
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


@pytest.mark.parametrize(
    ("output_format", "num_pages"),
    [
        ("parquet", 0),
        pytest.param("parquet", 2, marks=pytest.mark.slow),
        pytest.param("lance", 2, marks=pytest.mark.slow),
    ],
)
def test_folder_that_has_changed_embeds_only_what_is_new(
    output_format: str,
    num_pages: int,
    tmp_path: Path,
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    folder, output = pictures(tmp_path / "in", num_pages), tmp_path / "out"
    command = folder, output, "--rows-per-part", "4", "--format", output_format
    status, embedded = run_bulk(monkeypatch, random_checkpoint, *command)
    assert (status, len(embedded)) == (3, 7 + num_pages)
    before = vectors(output, output_format)
    capsys.readouterr()
    assert run_bulk(monkeypatch, random_checkpoint, *command) == (3, [])
    unit = "pages" if num_pages else "rows"
    shown = f"nothing to embed: the output already has all {7 + num_pages} {unit} of the input\n"
    assert capsys.readouterr().out == shown

    (folder / "7.png").write_bytes(encoded(picture(40, 48, 7)))
    PIL.Image.new("RGB", (48, 48), "red").save(folder / "1.png")
    touch(folder / "1.png")
    (folder / "2.png").unlink()
    pages = [f"report-01.pdf#page={page}" for page in range(1, num_pages + 2)] if num_pages else []
    if num_pages:
        write_documents(tmp_path / "longer", 1, num_pages + 1)
        (tmp_path / "longer" / "report-01.pdf").rename(folder / "report-01.pdf")
        touch(folder / "report-01.pdf")
    capsys.readouterr()
    status, embedded = run_bulk(monkeypatch, random_checkpoint, *command)
    assert sorted(embedded) == ["1.png", "7.png", *pages]
    assert status == 3
    assert f"since the last run, 1 files are new, {1 + bool(pages)} changed, 1 removed\n" in capsys.readouterr().err
    after = vectors(output, output_format)
    assert sorted(after) == ["0.png", "1.png", "3.png", "4.png", "5.png", "7.png", "broken.png", *pages]
    for name in ("0.png", "3.png", "4.png", "5.png", "broken.png"):
        assert after[name] == before[name]
    assert after["1.png"] != before["1.png"]


@pytest.mark.slow  # twelve runs; the test above is one of them
def test_rows_are_those_of_the_input_after_a_kill_at_any_step(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends before each single step that changes the output, and is started again."""
    folder = pictures(tmp_path / "in", 2)
    steps = [(plan_module.Plan, "write"), (Writer, "remove_parts_except"), (Writer, "keep_rows"), (Writer, "write")]
    for number, (owner, name) in enumerate(steps):
        output = tmp_path / f"out-{number}"
        command = folder, output, "--rows-per-part", "2"
        run_bulk(monkeypatch, random_checkpoint, *command)
        (folder / f"new-{number}.png").write_bytes(encoded(picture(40, 48, 20 + number)))
        touch(folder / "1.png")
        (folder / f"{number + 2}.png").unlink()
        with monkeypatch.context() as patch:

            def killed(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                run_bulk(patch, random_checkpoint, *command)
        assert run_bulk(monkeypatch, random_checkpoint, *command)[0] == 3
        names = {path.name for path in folder.glob("*.png")} | {f"report-01.pdf#page={page}" for page in (1, 2)}
        assert vectors(output).keys() == names
        assert len(list(output.glob("*.parquet"))) == len(plan_module.read_plan(output / "_bulk").parts)


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_lines_that_are_appended_are_embedded_and_those_before_them_kept(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = lines(tmp_path / "a.jsonl", list("abcdefg")), tmp_path / "out"
    path.write_text(path.read_text().rstrip("\n"))  # the last line has no line break yet
    command = path, output, "--rows-per-part", "3"
    assert run_bulk(monkeypatch, random_checkpoint, *command)[0] == 0
    before = vectors(output)
    lines(path, list("abcdefghij"))
    touch(path)
    assert run_bulk(monkeypatch, random_checkpoint, *command) == (0, ["a.jsonl#7", "a.jsonl#8", "a.jsonl#9"])
    after = vectors(output)
    assert list(after) == [f"a.jsonl#{row}" for row in range(10)]
    assert before.items() <= after.items()
    lines(path, list("abcXefghij"))  # from the changed line on
    touch(path)
    assert run_bulk(monkeypatch, random_checkpoint, *command)[1] == [f"a.jsonl#{row}" for row in range(3, 10)]
    found = vectors(output)
    assert sorted(found) == sorted(after)
    assert [row for row in after if not np.allclose(found[row], after[row], atol=1e-6)] == ["a.jsonl#3"]


def test_files_of_rows_are_replaced_as_a_whole(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "abc":
        pq.write_table(pa.table({"text": [f"{name} {row}" for row in range(3)]}), folder / f"{name}.parquet")
    command = folder, output, "--rows-per-part", "2"
    assert len(run_bulk(monkeypatch, random_checkpoint, *command)[1]) == 9
    before = vectors(output)
    pq.write_table(pa.table({"text": ["b 0", "b 9"]}), folder / "b.parquet")
    touch(folder / "b.parquet")
    (folder / "c.parquet").unlink()
    assert run_bulk(monkeypatch, random_checkpoint, *command) == (0, ["b.parquet#0", "b.parquet#1"])
    after = vectors(output)
    assert list(after) == [f"a.parquet#{row}" for row in range(3)] + ["b.parquet#0", "b.parquet#1"]
    np.testing.assert_allclose(after["b.parquet#0"], before["b.parquet#0"], atol=1e-6)
    assert after["b.parquet#1"] != before["b.parquet#1"]


def test_another_input_is_refused_and_one_that_was_moved_is_continued(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, output = lines(tmp_path / "a.jsonl", ["red"]), tmp_path / "out"
    run_bulk(monkeypatch, random_checkpoint, path, output)
    other = lines(tmp_path / "b.jsonl", ["blue"])
    with pytest.raises(SystemExit, match="2"):
        run_bulk(monkeypatch, random_checkpoint, other, output)
    assert "the output was started with the input" in capsys.readouterr().err
    assert list(vectors(output)) == ["a.jsonl#0"]
    (tmp_path / "moved").mkdir()
    path.rename(tmp_path / "moved" / "a.jsonl")
    other.rename(tmp_path / "moved" / "b.jsonl")
    assert run_bulk(monkeypatch, random_checkpoint, tmp_path / "moved", output) == (0, ["b.jsonl#0"])
    assert json.loads((output / "_bulk" / "job.json").read_text())["folder"] == str(tmp_path / "moved")


def test_output_of_an_earlier_version_is_refused_with_what_to_do(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, output = lines(tmp_path / "a.jsonl", ["red"]), tmp_path / "out"
    (output / "_bulk").mkdir(parents=True)
    (output / "_bulk" / "job.json").write_text('{"model": "bundled"}')
    with pytest.raises(SystemExit, match="2"):
        run_bulk(monkeypatch, random_checkpoint, path, output)
    assert "can be searched, not continued; use another OUTPUT" in capsys.readouterr().err


def test_errors_of_the_whole_output_are_counted_by_code(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "red"}\n{"text": 5}\n{"image": "data:image/png;base64,AAAA"}\n[]\n')
    assert run_bulk(monkeypatch, random_checkpoint, path, tmp_path / "out")[0] == 3
    assert "rows of the output with an error: 2 invalid_request, 1 invalid_media\n" in capsys.readouterr().err
    assert run_bulk(monkeypatch, random_checkpoint, path, tmp_path / "out") == (3, [])
