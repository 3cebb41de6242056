"""The progress that a run shows while its parts are unfinished."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

from embedder.bulk import progress
from embedder.bulk.progress import Progress, Reporter, read_counts
from embedder.bulk.source import Columns, Row
from embedder.bulk.worker import Job, Worker
from embedder.errors import InvalidRequest
from embedder.settings import Settings


def test_rows_of_an_unfinished_part_are_counted(tmp_path: Path, random_checkpoint: Path) -> None:
    """The reader of the part's rows looks at the counts while it is in the middle."""
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"text": f"text {row}"}) + "\n" for row in range(8)))
    (output / "_bulk").mkdir(parents=True)
    settings = Settings(model=str(random_checkpoint), device="cpu")
    worker = Worker(Job(path, output, "parquet", Columns(), None, "float32", settings))
    (part,) = worker.source.parts()
    seen: list[Any] = []
    rows = list(worker.source.rows(part))
    rows[2] = Row("bad", InvalidRequest("bad"))

    def slowly(*_: object) -> Any:
        for place, row in enumerate(rows):
            if place == 6:  # the first six are submitted; nothing of the part is written
                worker.embedder.embed(["something else"])
                while sum(counts[0] for counts in read_counts(worker.writer.state_folder).values()) < 6:
                    worker.reporter.report()
                seen.append(read_counts(worker.writer.state_folder))
                assert not worker.writer.is_written(part.number)
            yield row

    worker.source.rows = slowly  # type: ignore[method-assign]
    counts = worker({"part": part.to_json()})
    worker.close()
    assert seen == [{0: (6, 1)}]
    assert (counts["rows"], counts["errors"]) == (8, 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_has_the_rows_of_finished_and_unfinished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress(tmp_path, 10_000, 1000, "row") as shown:
        (tmp_path / "1.progress").write_text("500 2")
        (tmp_path / "2.progress").write_text("")  # is being written
        shown.show()
        assert "1500/10000" in screen.getvalue()
        assert "errors=2" in screen.getvalue()
        shown.finish(1, 4096, 3)
        assert "5096/10000" in screen.getvalue()
        assert not (tmp_path / "1.progress").exists()
        (tmp_path / "1.progress").write_text("600 2")  # the worker was late
        shown.show()
        assert "5096/10000" in screen.getvalue().rpartition("\r")[2]


def test_log_has_lines_with_rows_rate_and_remaining_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    with Progress(tmp_path, 10_000, 1000, "page") as shown:
        (tmp_path / "1.progress").write_text("500 2")
        shown.show()
    with Progress(tmp_path, 0, 0, "row") as shown:
        shown.show()
    text = capsys.readouterr().err
    assert "\r" not in text
    empty, first, *_, last = text.splitlines()
    assert empty.startswith("1,000 of 10,000 pages, ")
    assert first.startswith("1,500 of 10,000 pages, ")
    assert " per second, " in first
    assert " left, errors=2" in first
    assert last.startswith("500 rows, ")  # a tar's number of rows is not known


def test_counts_are_written_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 0.01)
    reporter = Reporter(tmp_path)
    with reporter.counting(3) as counter:
        counter.add(is_error=False)
        while read_counts(tmp_path) != {3: (1, 0)}:
            pass
    reporter.close()
