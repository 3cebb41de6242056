"""`embedder.search OUTPUT --serve --rerank MODEL`: reranking and clips, by its routes and in Chromium."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest
from selenium import webdriver

from benchmarks.demo_documents import write_documents
from embedder import Reranker
from tests.conftest import encoded
from tests.inputs.test_video import clip
from tests.playground.browser import LOOKS, Page, fits, needs_chromium, screenshot
from tests.search.served import serving

pytest.importorskip("ray", reason="comes with the `bulk` extra")

from tests.bulk.without_ray import run_bulk

pytestmark = pytest.mark.slow

NUM_ROWS = 4 + 4 + 3 + 1 + 1 + 18  # pages, segments, pictures
SHOWN = """
    const video = document.getElementById("viewer-video");
    return video.readyState >= 2 && !video.hidden && video.currentTime;
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and what `embedder.bulk` has made of it: two reports, a clip in three segments, and pictures."""
    base = tmp_path_factory.mktemp("reranked")
    folder = base / "documents"
    write_documents(folder / "reports", 2, 4)
    (folder / "talk.mp4").write_bytes(clip(num_frames=150, width=320, height=240))
    (folder / "old.mp4").write_bytes(clip("mpeg4 in MP4", num_frames=20))
    for number in range(18):
        PIL.Image.new("RGB", (96, 96), (13 * number, 80, 90)).save(folder / f"swatch-{number:02}.png")
    (folder / "red.png").write_bytes(encoded(PIL.Image.new("RGB", (96, 96), "red")))
    with pytest.MonkeyPatch.context() as patch:
        assert run_bulk(patch, Path("bundled"), folder, base / "vectors", "--segment-seconds", "2")[0] == 0
    return folder, base / "vectors"


@pytest.fixture(scope="module")
def url(documents: tuple[Path, Path], random_reranker: Path) -> Iterator[str]:
    """Where the command serves the collection."""
    with serving(documents[1], NUM_ROWS, "--rerank", str(random_reranker), device="cpu", dtype="float32") as url:
        yield url


def rerank(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/playground/rerank", json=body, timeout=60)


def rows_by_name(url: str) -> dict[str, int]:
    """Number of the row of each page, segment and picture."""
    found = httpx.post(f"{url}/playground/search", json={"limit": 100}).json()["results"]
    return {f"{one['file']}#{one['page'] or one['seconds'] or ''}": one["row"] for one in found}


def test_scores_are_those_of_the_library(url: str, documents: tuple[Path, Path], reranker: Reranker) -> None:
    rows = rows_by_name(url)
    red = documents[0] / "red.png"
    asked = [rows["red.png#"], rows["swatch-03.png#"]]
    expected = reranker.score("a swatch", [{"image": red}, {"image": documents[0] / "swatch-03.png"}])
    found = rerank(url, query="a swatch", rows=asked).json()["results"]
    assert [one["row"] for one in found] == asked
    assert [one["score"] for one in found] == pytest.approx(expected, abs=1e-4)
    by_picture = rerank(url, query={"image": base64.b64encode(red.read_bytes()).decode()}, rows=asked).json()["results"]
    own = reranker.score({"image": red}, [{"image": red}])[0]
    assert by_picture[0]["score"] == pytest.approx(own, abs=1e-4)
    other = rerank(url, query="a swatch", rows=asked[:1], instruction="Find the same color.").json()["results"]
    judged = reranker.score("a swatch", [{"image": red}], instruction="Find the same color.")
    assert other[0]["score"] == pytest.approx(judged[0], abs=1e-4)


def test_every_kind_of_row_has_a_score_and_one_that_is_gone_an_error(url: str, documents: tuple[Path, Path]) -> None:
    rows = rows_by_name(url)
    names = ["red.png#", "reports/report-01.pdf#2", "talk.mp4#2-4", "old.mp4#0-0.8"]
    red = documents[0] / "red.png"
    red.rename(red.with_suffix(".away"))
    try:
        gone, *found = rerank(url, query="red", rows=[rows[name] for name in names]).json()["results"]
    finally:
        red.with_suffix(".away").rename(red)
    assert gone["error"]["code"] == "invalid_media"
    assert "red.png" in gone["error"]["message"]
    assert all(0 < one["score"] < 1 for one in found)
    assert len({one["score"] for one in found}) == 3


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"query": "red", "rows": []}, 400, "rows"),
        ({"query": "red", "rows": [0] * 25}, 400, "rows"),
        ({"query": "red", "rows": [NUM_ROWS]}, 404, f"allowed: 0 to {NUM_ROWS - 1}"),
        ({"query": "red", "rows": [-1]}, 404, "no such rows"),
        ({"query": "red", "rows": ["../red.png"]}, 400, "rows"),
        ({"query": "", "rows": [0]}, 400, "query: text is empty"),
        ({"query": {"image": "AAAA"}, "rows": [0]}, 400, "query: image"),
        ({"rows": [0]}, 400, "query"),
    ],
)
def test_request_that_makes_no_sense_is_refused(body: dict[str, Any], status: int, reason: str, url: str) -> None:
    response = rerank(url, **body)
    assert response.status_code == status, response.text
    assert reason in response.json()["error"]["message"]


@pytest.fixture
def page(chromium: webdriver.Chrome, url: str) -> Iterator[Page]:
    """The page of the collection, newly opened. At the end, the browser has logged no error of the page."""
    page = Page(chromium, url)
    page.open_collection(24)
    yield page
    page.check_log()


def scores(page: Page, name: str) -> list[float]:
    return [float(text) for text in page.texts(f".page .score.{name} .value")]


@needs_chromium
def test_switch_orders_the_first_24_by_the_reranker_and_shows_both_scores(page: Page) -> None:
    page.ask("pineapple")
    by_similarity = [float(text) for text in page.texts(".page .value")]
    assert by_similarity == sorted(by_similarity, reverse=True)
    page.one("#rerank").click()
    page.wait(lambda: len(scores(page, "reranker")) == 24, 120)
    assert scores(page, "reranker") == sorted(scores(page, "reranker"), reverse=True)
    assert sorted(scores(page, "similarity"), reverse=True) == by_similarity
    assert "the first 24 in the order of the reranker" in page.one("#asked").text
    page.one("#more-results").click()
    page.wait(lambda: len(page.all(".page")) == NUM_ROWS)
    assert len(scores(page, "reranker")) == 24
    assert page.all(".page")[24].text.count("similarity") == 0
    page.one("#rerank").click()
    page.wait(lambda: not page.all(".page .score.reranker"))


@needs_chromium
def test_row_that_cannot_be_read_and_a_service_that_fails_say_why(page: Page, documents: tuple[Path, Path]) -> None:
    page.one("#rerank").click()
    report = documents[0] / "reports" / "report-01.pdf"
    report.rename(report.with_suffix(".away"))
    try:
        page.ask("strawberry")
        page.wait(lambda: page.all(".page .not-reranked"), 120)
        assert "Not reranked: path 'reports/report-01.pdf' cannot be read" in page.all(".page .not-reranked")[0].text
        assert len(scores(page, "reranker")) == 20
        assert page.all(".page")[23].text.count("Not reranked")
    finally:
        report.with_suffix(".away").rename(report)
    page.answer("playground/rerank", {"status": 503, "body": {"error": {"message": "the queue is full"}}})
    page.ask("watermelon")
    page.wait(lambda: "the queue is full" in page.one("#search-state").text)
    assert len(page.texts(".page .value")) == 24
    page.one("#search-state button").click()
    page.wait(lambda: len(scores(page, "reranker")) == 24, 120)
    assert not page.one("#search-state").is_displayed()


@needs_chromium
def test_segment_is_played_at_its_time_and_another_clip_shows_its_first_frame(page: Page) -> None:
    page.one("#more-results").click()
    page.wait(lambda: len(page.all(".page")) == NUM_ROWS)
    page.one("[aria-label='Show talk.mp4, 2-4 s']").click()
    page.wait(lambda: 2 <= page.driver.execute_script(SHOWN) <= 4.1)
    assert page.one("#viewer-file").text == "Open at 2-4 s"
    assert str(page.one("#viewer-file").get_attribute("href")).endswith("#t=2,4")
    page.one("#viewer-close").click()
    assert not page.one("#viewer-video").get_attribute("src")
    page.one("[aria-label='Show old.mp4, 0-0.8 s']").click()
    page.wait(lambda: page.one("#viewer-image").is_displayed())
    assert page.one("#viewer-state").text == "This browser cannot play the clip. This is its first frame."
    page.one("#viewer-close").click()


@needs_chromium
@pytest.mark.parametrize("look", LOOKS)
def test_reranked_pages_and_clips_fit_every_screen(look: str, page: Page, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PLAYGROUND_SCREENSHOTS") or tmp_path)
    with page.looking(look) as (width, _):
        page.one("#rerank").click()
        page.ask("sales of pineapple")
        page.wait(lambda: len(scores(page, "reranker")) == 24, 120)
        fits(page, width)
        screenshot(page, folder / f"{look}-reranked-pages.png")
        page.one("#more-results").click()
        page.wait(lambda: len(page.all(".page")) == NUM_ROWS)
        page.one("[aria-label='Show talk.mp4, 2-4 s']").click()
        page.wait(lambda: page.driver.execute_script(SHOWN))
        fits(page, width)
        screenshot(page, folder / f"{look}-clip.png")
        page.one("#viewer-close").click()
