"""Outputs of data sets: the search shows the texts and the pictures of their rows, which it reads from the input."""

from __future__ import annotations

import io
import json
import os
import tarfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest
from selenium import webdriver

from embedder.settings import Settings
from tests.conftest import encoded
from tests.inputs.test_video import clip
from tests.playground.browser import LOOKS, Page, fits, needs_chromium, screenshot
from tests.search.conftest import embed_with_the_bundled_model
from tests.search.served import serving

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

import pyarrow as pa
import pyarrow.parquet as pq

from embedder.bulk.source import Columns, Source
from embedder.search.__main__ import main

RED = encoded(PIL.Image.new("RGB", (96, 96), "red"))
ROWS: list[dict[str, Any]] = [
    {"text": "an airplane over the sea"},
    {"text": f"a cat\n{'and a long story ' * 900}"},
    {"text": ""},
    {"text": "a red swatch", "image": RED},
    {"image": RED},
    {"video": clip(num_frames=12, width=64, height=64)},
    {"text": "<b>a dog</b>"},
]
EMBEDDED = [row for row in ROWS if any(row.values())]


def write(folder: Path, kind: str) -> Path:
    """The rows as a data set, in Parquet of several row groups."""
    folder.mkdir()
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        schema = pa.schema({"text": pa.string(), "image": pa.binary(), "video": pa.binary()})
        pq.write_table(pa.Table.from_pylist(ROWS, schema), path, row_group_size=2)
        return path
    if kind == "jsonl":
        lines = [
            {name: value if name == "text" else b64encode(value).decode() for name, value in row.items()}
            for row in ROWS
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
        return path
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(ROWS):
            for name, suffix in (("text", "txt"), ("image", "png"), ("video", "mp4")):
                if name in row:
                    data = row[name].encode() if name == "text" else row[name]
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_some_rows_of_a_part_are_those_of_the_whole_part(kind: str, tmp_path: Path) -> None:
    source = Source(write(tmp_path / "in", kind), Columns(), Settings())
    for part in source.parts(5):
        every = [(row.id, row.fields) for row in source.rows(part)]
        for places in ({0}, {1, 4}, {3}, {0, 1, 2, 3, 4, 5, 6}):
            some = [(row.id, row.fields) for row in source.rows(part, only=places)]
            assert some == [row for place, row in enumerate(every) if place in places]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The input, and the output."""
    folder = tmp_path_factory.mktemp("texts")
    path = write(folder / "in", "parquet")
    embed_with_the_bundled_model(path, folder / "out", rows_per_part=3)
    return path, folder / "out"


def test_table_and_json_show_the_texts(data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data[1]), "airplane", "--json"]) == 0
    snippets = {one["id"]: one["snippet"] for one in json.loads(capsys.readouterr().out)}
    assert snippets["rows.parquet#0"] == "an airplane over the sea"
    assert snippets["rows.parquet#3"] == "a red swatch"
    assert snippets["rows.parquet#4"] == ""
    assert len(snippets) == len(EMBEDDED)


def test_text_that_cannot_be_read_anymore_is_said(data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data[0].rename(data[0].with_suffix(".away"))
    try:
        assert main([str(data[1]), "airplane"]) == 0
    finally:
        data[0].with_suffix(".away").rename(data[0])
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1 + len(EMBEDDED)
    assert output.err == f"without its text: the input cannot be read: {data[0]} does not exist\n"


@pytest.fixture(scope="module")
def url(data: tuple[Path, Path]) -> Iterator[str]:
    """Where the command serves the collection."""
    with serving(data[1], len(EMBEDDED)) as url:
        yield url


def rows(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.post(f"{url}/playground/search", json={"limit": 10}).json()["results"]
    return found


def test_rows_have_their_text_and_say_whether_they_have_a_picture(url: str) -> None:
    shown = [(one["text"][:20], one["has_picture"]) for one in rows(url)]
    assert shown == [(row.get("text", "")[:20], len(row) > 1 or "text" not in row) for row in EMBEDDED]
    assert len(rows(url)[1]["text"]) == 10_000


def test_pictures_of_rows_are_served_and_texts_have_none(url: str) -> None:
    for row, one in enumerate(EMBEDDED):
        for kind in ("thumbnails", "pages"):
            response = httpx.get(f"{url}/playground/{kind}/{row}")
            assert response.status_code == (200 if {"image", "video"} & set(one) else 404)
    picture = PIL.Image.open(io.BytesIO(httpx.get(f"{url}/playground/pages/3").content)).convert("RGB")
    assert picture.getpixel((5, 5))[0] > 250  # type: ignore[index]
    assert httpx.get(f"{url}/playground/files/0").status_code == 400


def test_row_whose_input_is_gone_says_so(url: str, data: tuple[Path, Path]) -> None:
    data[0].rename(data[0].with_suffix(".away"))
    try:
        shown = rows(url)
    finally:
        data[0].with_suffix(".away").rename(data[0])
    assert {one["unread"].partition(":")[0] for one in shown} == {"the input cannot be read"}


@pytest.fixture
def page(chromium: webdriver.Chrome, url: str) -> Iterator[Page]:
    """The page of the collection, newly opened. At the end, the browser has logged no error of the page."""
    page = Page(chromium, url)
    page.open_collection(len(EMBEDDED))
    yield page
    page.check_log()


@needs_chromium
def test_cards_show_texts_with_the_words_of_the_question_and_open_whole(page: Page) -> None:
    assert page.one("#search-label").text == "Search 6 rows of in"
    page.ask("airplane")
    card = page.one(".page:has(mark)")
    assert card.find_element("css selector", ".passage").text == "an airplane over the sea"
    assert page.texts(".passage mark") == ["airplane"]
    assert len(page.all(".page .open img")) == 3
    assert page.one("#asked").text.startswith("The best 6 rows by similarity to airplane")
    card.find_element("css selector", ".passage").click()
    assert page.one("#viewer-text").text == "an airplane over the sea"
    assert not page.one("#viewer-image").is_displayed()
    assert not page.one("#viewer-file").is_displayed()
    page.one("#viewer-close").click()
    (dog,) = [one for one in page.all(".passage") if "dog" in one.text]
    assert dog.text == "<b>a dog</b>"


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_texts_fit_every_screen(look: str, page: Page, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PLAYGROUND_SCREENSHOTS") or tmp_path)
    with page.looking(look) as (width, _):
        page.ask("a red swatch")
        fits(page, width)
        screenshot(page, folder / f"{look}-texts.png")
        page.all(".passage")[-1].click()
        page.wait(lambda: page.one("#viewer-text").text)
        fits(page, width)
        screenshot(page, folder / f"{look}-text-viewer.png")
        page.one("#viewer-close").click()
