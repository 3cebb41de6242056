"""The playground on a collection: `embedder.search OUTPUT --serve`, its routes, and the page in Chromium."""

from __future__ import annotations

import base64
import http.client
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from embedder.errors import InvalidMedia
from embedder.settings import Settings
from tests.conftest import encoded, slow_except
from tests.playground.browser import LOOKS, Page, fits, needs_chromium, screenshot
from tests.search.conftest import Indexed
from tests.search.served import serving

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

from embedder.bulk.thumbnails import THUMBNAIL_PIXELS
from embedder.search import page_images
from embedder.search.__main__ import main

PICTURES_ARE_SEEN = """
    return [...document.querySelectorAll(".page img, #viewer[open] img")].every((image) => image.naturalWidth > 90);
"""


@pytest.fixture(scope="module")
def url(indexed: Indexed) -> Iterator[str]:
    """Where the command serves the collection."""
    with serving(indexed.output, 9) as url:
        yield url


def search(url: str, **body: Any) -> list[dict[str, Any]]:
    response = httpx.post(f"{url}/playground/search", json=body)
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def vector(url: str, item: Any) -> str:
    """The item's vector, as a query of the page has it."""
    collection = httpx.get(f"{url}/playground/collection").json()
    body = {"items": [item], "instruction": collection["query_instruction"], "encoding_format": "base64"}
    embedding: str = httpx.post(f"{url}/embed", json=body).json()["results"][0]["embedding"]
    return embedding


def test_question_finds_its_page_with_the_lines_that_match(url: str, indexed: Indexed) -> None:
    name = indexed.subjects[0][1]
    best = search(url, vector=vector(url, name), question=f"How much {name}?", limit=2)
    assert len(best) == 2
    assert (best[0]["file"], best[0]["page"]) == ("reports/report-01.pdf", 2)
    assert best[0]["lines"][0] == f"Sales of {name}, 2021 to 2025"
    assert len(best[0]["lines"]) == 2
    assert best[0]["score"] > best[1]["score"]


def test_without_a_query_the_rows_come_in_their_order(url: str) -> None:
    rows = search(url, limit=3)
    assert [(row["file"], row["page"], row["score"]) for row in rows] == [
        ("red.png", None, None),
        ("reports/report-01.pdf", 1, None),
        ("reports/report-01.pdf", 2, None),
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"vector": "!"}, "base64"),
        ({"vector": base64.b64encode(b"123").decode()}, "vector of 3 bytes"),
        ({"vector": ""}, "vector of 0 bytes"),
        ({"vector": base64.b64encode(np.zeros(64, "<f4").tobytes()).decode()}, "only zeros"),
        ({"vector": base64.b64encode(np.full(64, np.nan, "<f4").tobytes()).decode()}, "not finite"),
        ({"vector": base64.b64encode(np.ones(10_000, "<f4").tobytes()).decode()}, "allowed: 1 to 192 values"),
        ({"limit": 0}, "limit"),
        ({"limit": 10**9}, "limit"),
        ({"path": "/etc/passwd"}, "path"),
    ],
)
def test_search_that_makes_no_sense_is_refused(body: dict[str, Any], reason: str, url: str) -> None:
    response = httpx.post(f"{url}/playground/search", json=body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_page_is_rendered_when_it_is_asked_for(url: str) -> None:
    small, large = (httpx.get(f"{url}/playground/{kind}/3") for kind in ("thumbnails", "pages"))
    assert small.headers["content-type"] == large.headers["content-type"] == "image/jpeg"
    sizes = [PIL.Image.open(io.BytesIO(one.content)).size for one in (small, large)]
    assert sizes == [(256, 256), (1344, 1344)]  # 480 points are 1333 pixels in 200 dots per inch
    picture = PIL.Image.open(io.BytesIO(httpx.get(f"{url}/playground/pages/0").content))
    assert picture.size == (96, 96)
    assert np.abs(np.array(picture.convert("RGB").getpixel((50, 50))) - [255, 0, 0]).max() < 3


def test_source_file_is_served_whole_and_in_ranges(url: str, indexed: Indexed) -> None:
    data = (indexed.folder / "reports" / "report-01.pdf").read_bytes()
    response = httpx.get(f"{url}/playground/files/2")
    assert response.content == data
    assert response.headers["content-type"] == "application/pdf"
    assert response.headers["content-disposition"] == 'inline; filename="report-01.pdf"'
    assert httpx.get(f"{url}/playground/files/2", headers={"range": "bytes=0-9"}).content == data[:10]


@pytest.mark.parametrize("kind", ["thumbnails", "pages", "files"])
@pytest.mark.parametrize(
    "row",
    [
        *("9", "-1", "1.0", "x", "", "99999999999999999999", "..%2f..%2fetc%2fpasswd", "../../etc/passwd", "0%00"),
        *("%2fetc%2fpasswd", "reports%2freport-01.pdf", "%d9%a1", "1/../../../job.json"),
    ],
)
def test_only_rows_of_the_collection_are_served(kind: str, row: str, url: str) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.putrequest("GET", f"/playground/{kind}/{row}")
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 404
    assert b"not_found" in body


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "[::2]:80", ""])
def test_page_of_another_site_cannot_read_the_collection(host: str, url: str) -> None:
    response = httpx.get(f"{url}/playground/collection", headers={"host": host})
    assert response.status_code == 400
    assert "allowed: localhost" in response.json()["error"]["message"]


def test_start_leads_to_the_search(url: str) -> None:
    response = httpx.get(f"{url}/")
    assert (response.status_code, response.headers["location"]) == (307, "playground#search")


def test_taken_port_is_said_in_a_line(url: str, indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(indexed.output), "--serve", "--port", url.rpartition(":")[2]])
    assert "Address already in use" in capsys.readouterr().err.splitlines()[-1]


def test_rows_that_lead_outside_the_folder_are_refused(tmp_path: Path) -> None:
    """An output can be untrusted too."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(PIL.Image.new("RGB", (64, 64))))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "job.json").write_text("{}")
    images = page_images.PageImages(folder, Settings())
    try:
        for row_id in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "job.json", "missing.pdf#page=1"):
            with pytest.raises(InvalidMedia):
                images.render(row_id, 65536)
            with pytest.raises(InvalidMedia):
                images.source(row_id)
    finally:
        images.close()


def test_cache_of_pictures_is_bounded(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_images, "CACHE_BYTES", 40_000)
    images = page_images.PageImages(indexed.folder, Settings())
    try:
        rows = [f"reports/report-0{document}.pdf#page={page}" for document in (1, 2) for page in (1, 2, 3, 4)]
        pictures = [images.render(row, THUMBNAIL_PIXELS) for row in rows]
        kept = list(images._cache.values())
        assert sum(map(len, kept)) == images._num_bytes <= 40_000
        assert 1 < len(kept) < len(rows)
        assert images.render(rows[0], THUMBNAIL_PIXELS) == pictures[0]
    finally:
        images.close()


@pytest.fixture
def page(chromium: webdriver.Chrome, url: str) -> Iterator[Page]:
    """The page of the collection, newly opened. At the end, the browser has logged no error of the page."""
    page = Page(chromium, url)
    page.open_collection(9)
    yield page
    page.check_log()


@needs_chromium
def test_found_page_is_shown_large_and_opens_in_its_file(page: Page, indexed: Indexed) -> None:
    assert page.one("#search-label").text == "Search 9 pages of documents"
    assert page.one("#rerank-hint").text == "To rerank the first 24 results, start this search with --rerank bundled."
    name = indexed.subjects[1][0]
    page.ask(name)
    assert page.texts(".page .name")[0] == "report-02.pdf"
    assert page.texts(".page:first-child .lines mark")[0] == name
    page.one(".page .open").click()
    page.wait(lambda: page.one("#viewer-image").is_displayed())
    assert page.one("#viewer-name").text == "reports/report-02.pdf, page 1"
    assert int(page.one("#viewer-image").get_property("naturalWidth") or 0) == 1344  # type: ignore[call-overload]
    link = page.one("#viewer-file")
    row = str(link.get_attribute("href")).partition("/files/")[2]
    assert (link.text, row) == ("Open at page 1", "5#page=1")
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.one("#viewer-name").text != "reports/report-02.pdf, page 1")
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.one("#viewer").is_displayed())


@needs_chromium
def test_fewer_dimensions_rank_again(page: Page, indexed: Indexed) -> None:
    page.ask(indexed.subjects[1][0])
    before = page.texts(".page .value")
    page.choose_dimensions(64)
    page.wait(lambda: "64 dimensions" in page.one("#asked").text and page.texts(".page .value") != before)


@needs_chromium
def test_page_that_cannot_be_shown_says_why(page: Page, indexed: Indexed) -> None:
    page.ask(indexed.subjects[0][1])
    source = indexed.folder / "reports" / "report-01.pdf"
    source.rename(source.with_suffix(".away"))
    try:
        page.one(".page .open").click()
        page.wait(lambda: "cannot be read" in page.one("#viewer-state").text)
        assert not page.one("#viewer-image").is_displayed()
    finally:
        source.with_suffix(".away").rename(source)
    page.one("#viewer-close").click()


@needs_chromium
@pytest.mark.parametrize("look", slow_except(LOOKS, "phone-dark"))
def test_collection_fits_every_screen_in_light_and_dark(
    look: str, page: Page, indexed: Indexed, tmp_path: Path
) -> None:
    folder = Path(os.environ.get("PLAYGROUND_SCREENSHOTS") or tmp_path)
    with page.looking(look) as (width, _):
        page.ask(f"sales of {indexed.subjects[0][2]}")
        page.driver.execute_script("scrollTo(0, document.body.scrollHeight)")  # the browser loads what is near
        page.wait(lambda: page.driver.execute_script(PICTURES_ARE_SEEN))
        page.driver.execute_script("scrollTo(0, 0)")
        fits(page, width)
        screenshot(page, folder / f"{look}-pages.png")
        page.one(".page .open").click()
        page.wait(lambda: page.one("#viewer-image").is_displayed())
        fits(page, width)
        screenshot(page, folder / f"{look}-viewer.png")
        page.one("#viewer-close").click()
