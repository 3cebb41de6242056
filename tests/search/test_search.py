"""From a folder of PDFs to the right page: `embedder.bulk`, then `embedder.search`."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from benchmarks.demo_documents import write_documents
from embedder import Embedder, Reranker
from embedder.documents.pages import DocumentReader
from embedder.inputs.regimes import CheckpointRegime
from embedder.search.snippet import find_snippet
from tests.bulk.interrupted import run_and_kill
from tests.conftest import ROOT, encoded
from tests.search.conftest import Indexed

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

import pyarrow.dataset
import pyarrow.parquet

from embedder.search.__main__ import main
from embedder.search.collection import Collection
from embedder.settings import Settings
from tests.bulk.without_ray import run_bulk

ROWS = pyarrow.schema({"key": pyarrow.string(), "text": pyarrow.string(), "image": pyarrow.binary()})

QUESTIONS = [
    "cactus", "pineapple", "strawberry", "banana", "grapes",
    "watermelon", "guitar", "violin", "ferris wheel", "rainbow",
]  # fmt: skip


def search(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_every_page_is_a_row_with_its_text_and_a_broken_file_is_one_row_with_its_error(indexed: Indexed) -> None:
    rows = pyarrow.dataset.dataset(indexed.output).to_table().to_pylist()
    pages = [f"reports/report-0{document}.pdf#page={page}" for document in (1, 2) for page in (1, 2, 3, 4)]
    assert [row["id"] for row in rows] == ["broken.pdf", "red.png", *pages]
    assert rows[0]["error"] == "invalid_media: the PDF is damaged: it has no readable structure"
    assert all(row["error"] is None for row in rows[1:])
    names = [name for document in indexed.subjects for name in document]
    assert all(f"Sales of {name}," in row["text"] for name, row in zip(names, rows[2:], strict=True))
    assert rows[1]["text"] is None


@pytest.mark.parametrize("place", [(0, 1), (1, 0), (1, 3)])
def test_question_finds_its_page(place: tuple[int, int], indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    name = indexed.subjects[place[0]][place[1]]
    best = search(capsys, str(indexed.output), name)[0]
    assert (best["file"], best["page"]) == (f"reports/report-0{place[0] + 1}.pdf", place[1] + 1)
    assert name in best["snippet"]


def test_picture_finds_itself(indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    best = search(capsys, str(indexed.output), "--image", str(indexed.folder / "red.png"), "--limit", "1")
    assert [(one["file"], one["page"], one["score"]) for one in best] == [("red.png", None, 1.0)]


def test_table_has_a_line_for_each_result(indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(indexed.output), "foggy", "--limit", "2"]) == 0
    header, first, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["score", "file", "page", "text"]
    assert first.split()[1:5] == ["reports/report-01.pdf", "2", "Sales", "of"]


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (["{output}"], {}, "got no query"),
        (["{output}", "red", "--limit", "0"], {}, "--limit: got 0"),
        (["{folder}", "red"], {}, "is not an output of embedder.bulk"),
        (["{output}", "red", "--rerank"], {}, "--rerank needs a checkpoint folder, a hub id or `bundled`"),
        (["{output}", "--rerank", "red"], {}, "got no query"),
        (["{output}", "red", "--candidates", "9"], {}, "--candidates needs --rerank"),
        (["{output}", "red", "--rerank", "m", "--candidates", "9"], {}, "got 9; allowed: 10 (--limit) and more"),
        (["{output}", "red"], {"EMBEDDER_MODEL": "{random}"}, "was embedded by bundled, but EMBEDDER_MODEL names"),
        (["{output}", "--image", "{folder}/none.png"], {}, "none.png"),
    ],
)
def test_what_cannot_be_searched_is_said_in_a_line(
    arguments: list[str],
    environment: dict[str, str],
    reason: str,
    indexed: Indexed,
    random_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(random=random_checkpoint))
    with pytest.raises(SystemExit, match="2"):
        main([one.format(output=indexed.output, folder=indexed.folder) for one in arguments])
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_candidates_come_in_the_order_of_the_reranker_with_both_scores(
    indexed: Indexed, random_reranker: Path, reranker: Reranker, capsys: pytest.CaptureFixture[str]
) -> None:
    by_similarity = search(capsys, str(indexed.output), "cyclone", "--limit", "6")
    arguments = [str(indexed.output), "cyclone", "--rerank", str(random_reranker)]
    found = search(capsys, *arguments, "--candidates", "6", "--limit", "6")
    assert [one["id"] for one in found] != [one["id"] for one in by_similarity]
    assert {one["id"]: one["score"] for one in found} == {one["id"]: one["score"] for one in by_similarity}
    assert [one["rerank_score"] for one in found] == sorted((one["rerank_score"] for one in found), reverse=True)
    with DocumentReader(Settings()) as pages:
        shown = [pages.render(indexed.folder / one["file"], one["page"], CheckpointRegime()).image for one in found]
    expected = reranker.score("cyclone", shown)
    assert [one["rerank_score"] for one in found] == pytest.approx(expected, abs=1e-4)
    assert search(capsys, *arguments, "--candidates", "6", "--limit", "2") == found[:2]
    best = search(capsys, *arguments, "--limit", "9")
    assert len(best) == 9, "24 candidates are more than all rows"


@pytest.mark.slow
def test_row_that_cannot_be_read_anymore_is_the_last_and_says_why(
    indexed: Indexed, random_reranker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = indexed.folder / "red.png"
    picture.rename(picture.with_suffix(".away"))
    try:
        query = ["--image", str(picture.with_suffix(".away")), "--rerank", str(random_reranker)]
        assert main([str(indexed.output), *query]) == 0
        lines = capsys.readouterr()
        found = search(capsys, str(indexed.output), *query)
    finally:
        picture.with_suffix(".away").rename(picture)
    assert lines.out.splitlines()[0].split() == ["rerank", "score", "file", "page", "text"]
    assert lines.out.splitlines()[-1].split() == ["error", "1.0000", "red.png"]
    assert "not reranked: red.png: " in lines.err
    assert (found[-1]["rerank_score"], found[-1]["score"]) == (None, 1.0)
    assert "red.png" in found[-1]["rerank_error"]
    assert all(one["rerank_score"] is not None for one in found[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
@pytest.mark.parametrize("output_format", ["parquet", "lance"])
def test_rows_of_data_sets_are_read_again_for_the_reranker(
    kind: str,
    output_format: str,
    random_checkpoint: Path,
    random_reranker: Path,
    reranker: Reranker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Texts, a picture, both, and rows with errors, which the output counts and the search does not."""
    red = encoded(PIL.Image.new("RGB", (64, 64), "red"))
    rows: list[dict[str, Any]] = [{"key": f"k{number}", "text": f"text {number}"} for number in range(9)]
    rows[2] = {"key": "k2"}
    rows[4] = {"key": "k4", "image": red}
    rows[7] = {"key": "k7", "text": "a swatch", "image": red}
    folder = tmp_path / "in"
    write_rows(folder, kind, rows)
    options = ["--format", output_format, "--rows-per-part", "4", *(["--id", "key"] if kind != "tar" else [])]
    assert run_bulk(monkeypatch, random_checkpoint, folder, tmp_path / "out", *options)[0] in (0, 3)
    capsys.readouterr()
    found = search(capsys, str(tmp_path / "out"), "a swatch", "--rerank", str(random_reranker))
    names = {row["key"]: {name: value for name, value in row.items() if name != "key"} for row in rows}
    names.pop("k2")
    assert {one["id"] for one in found} == set(names)
    expected = dict(zip(names, reranker.score("a swatch", names.values()), strict=True))
    assert {one["id"]: one["rerank_score"] for one in found} == pytest.approx(expected, abs=1e-4)
    for path in folder.iterdir():
        path.unlink()
    gone = search(capsys, str(tmp_path / "out"), "a swatch", "--rerank", str(random_reranker))
    assert all("the input cannot be read" in one["rerank_error"] for one in gone)


def write_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    """A data set with these rows. In a tar, a row without content is left out."""
    folder.mkdir()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, ROWS), folder / "a.parquet")
    elif kind == "jsonl":
        encode = {"image": lambda data: base64.b64encode(data).decode()}
        lines = [{name: encode.get(name, str)(value) for name, value in row.items()} for row in rows]
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        with tarfile.open(folder / "a.tar", "w") as tar:
            for row in rows:
                for name, suffix in (("text", "txt"), ("image", "png")):
                    if name in row:
                        data = row[name].encode() if name == "text" else row[name]
                        member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


def test_snippet_is_the_line_with_most_of_the_words() -> None:
    text = "Annual report\nSales of pizza fell\n\nSales of pasta rose in\x1b[31m Rome"
    assert find_snippet(text, "Where did sales of pasta rise?", 80) == "Sales of pasta rose in?[31m Rome"
    assert find_snippet(text, "unknown", 80) == "Annual report"
    assert find_snippet(text, "pizza", 10) == "Sales of …"
    assert find_snippet("", "pizza", 10) == ""


@pytest.mark.slow  # Ray starts twice
@pytest.mark.timeout(600)
def test_two_commands_find_pages_among_200_and_a_kill_costs_no_page(tmp_path: Path) -> None:
    subjects = write_documents(tmp_path / "documents", 20, 10)
    output = tmp_path / "vectors"
    command = [sys.executable, "-m", "embedder.bulk", str(tmp_path / "documents"), str(output)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
    run_and_kill(command, environment, output, 3)
    assert len(list(output.glob("*.parquet"))) < 13
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    table = pyarrow.dataset.dataset(output).to_table()
    pages = [f"report-{document:02}.pdf#page={page}" for document in range(1, 21) for page in range(1, 11)]
    assert table["id"].to_pylist() == pages
    assert np.isfinite(np.array(table["embedding"].to_pylist())).all()
    names = [name for document in subjects for name in document]
    for question in QUESTIONS:
        run = subprocess.run(
            [sys.executable, "-m", "embedder.search", str(output), question, "--json", "--limit", "1"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(run.stdout)[0]["id"] == pages[names.index(question)], question
    collection = Collection(output)
    with Embedder(device="cpu") as embedder:
        best = [collection.search(vector, 1)[0].id for vector in embedder.embed_query(names)]
    share = np.mean([found == page for found, page in zip(best, pages, strict=True)])
    assert 0.69 <= share <= 0.73  # docs/guides/documents.md says 71 %
