"""The switch of the playground that reranks the first 24 pictures, in Chromium, with a service that has a reranker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from embedder import Reranker
from tests.conftest import Server, start_server
from tests.playground.browser import LOOKS, Page, fits, needs_chromium, screenshot

pytestmark = pytest.mark.slow

NUM_PICTURES = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Swatches of other colors. The service reduces them: they are larger than their thumbnails."""
    folder = tmp_path_factory.mktemp("swatches")
    for number in range(NUM_PICTURES):
        PIL.Image.new("RGB", (320, 320), (8 * number, 90, 255 - 8 * number)).save(folder / f"swatch-{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def judging_server(pictures: Path, random_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = {"model": "bundled", "reranker": str(random_reranker), "demo_folder": str(pictures), "device": "cpu"}
    server = start_server(tmp_path_factory.mktemp("server"), **options)
    yield server
    assert server.stop() == 0


@pytest.fixture
def page(chromium: webdriver.Chrome, judging_server: Server) -> Iterator[Page]:
    """The search, newly opened. At the end, the browser has logged no error of the page."""
    page = Page(chromium, judging_server.url)
    page.open()
    page.open_search()
    yield page
    page.check_log()


def scores(page: Page, name: str) -> list[float]:
    return [float(text) for text in page.texts(f".result .score.{name} .value")]


def search_reranked(page: Page, text: str) -> None:
    page.one("#query").clear()
    page.one("#query").send_keys(text, Keys.ENTER)
    page.wait(lambda: text in page.one("#asked").text and scores(page, "reranker"), 120)


@needs_chromium
def test_first_24_pictures_have_the_scores_of_the_library(page: Page, pictures: Path, reranker: Reranker) -> None:
    assert not page.one("#rerank-hint").is_displayed()
    page.one("#query").send_keys("blue", Keys.ENTER)
    by_similarity = dict(page.ranking()[:24])
    page.one("#rerank").click()
    page.wait(lambda: len(scores(page, "reranker")) == 24, 120)
    found = page.texts(".result .name")
    assert set(found) == set(by_similarity)
    assert dict(zip(found, scores(page, "similarity"), strict=True)) == by_similarity
    expected = reranker.score("blue", [{"image": pictures / name} for name in found])
    assert scores(page, "reranker") == pytest.approx(expected, abs=6e-4)
    assert expected == sorted(expected, reverse=True)
    page.choose_dimensions(64)
    page.wait(lambda: "64 dimensions" in page.one("#asked").text and len(scores(page, "reranker")) == 24, 120)
    page.one("#rerank").click()
    page.wait(lambda: not scores(page, "reranker"))
    assert [score for _, score in page.ranking()] == sorted((score for _, score in page.ranking()), reverse=True)


@needs_chromium
def test_picture_that_is_gone_says_so_and_a_cancelled_run_can_be_tried_again(page: Page, pictures: Path) -> None:
    page.one("#query").send_keys("a blue square", Keys.ENTER)
    gone = pictures / page.ranking()[0][0]
    gone.rename(gone.with_suffix(".away"))
    try:
        page.one("#rerank").click()
        page.wait(lambda: scores(page, "reranker"), 120)
        assert page.texts(".result .not-reranked") == [
            "Not reranked: the file cannot be read: No such file or directory"
        ]
        assert page.texts(".result .name")[23] == gone.name, "it is the last of the first 24"
        assert len(scores(page, "reranker")) == 23
    finally:
        gone.with_suffix(".away").rename(gone)
    page.driver.execute_script(
        "const real = fetch; window.fetch = (url, options) => url === 'playground/rerank' ? new Promise((_, reject) =>"
        "options.signal.addEventListener('abort', () => reject(options.signal.reason))) : real(url, options);"
        "window.restore = () => (window.fetch = real);"
    )
    page.one("#query").clear()
    page.one("#query").send_keys("a red square", Keys.ENTER)
    page.wait(lambda: "Reranking the first 24…" in page.one("#search-state").text)
    page.one("#search-state button").click()
    page.wait(lambda: "Cancelled." in page.one("#search-state").text)
    assert len(page.texts(".result .value")) == 24
    page.driver.execute_script("restore()")
    page.one("#search-state button").click()
    page.wait(lambda: len(scores(page, "reranker")) == 24, 120)
    assert not page.one("#search-state").is_displayed()


@needs_chromium
@pytest.mark.parametrize("look", LOOKS)
def test_both_scores_fit_every_screen(look: str, page: Page, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PLAYGROUND_SCREENSHOTS") or tmp_path)
    with page.looking(look) as (width, _):
        page.one("#rerank").click()
        search_reranked(page, "a purple square")
        fits(page, width)
        for cell in page.all(".result .score"):
            assert page.driver.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", cell)
        screenshot(page, folder / f"{look}-reranked.png")


@needs_chromium
def test_bundled_models_find_a_drawing_of_the_demo_with_both_scores(
    chromium: webdriver.Chrome, bundled_pair_server: Server
) -> None:
    page = Page(chromium, bundled_pair_server.url)
    page.open()
    assert "reranker bundled-reranker" in page.one("#model").text
    page.open_search()
    page.one("#rerank").click()
    search_reranked(page, "guitar")
    assert len(scores(page, "reranker")) == len(scores(page, "similarity")) == 24
    assert page.texts(".result .name")[0] == "guitar"
    assert scores(page, "reranker") == sorted(scores(page, "reranker"), reverse=True)
    page.check_log()
