"""The playground in Chromium, with real keys, clicks and drops, against the bundled model.

Screenshots are written to the folder `PLAYGROUND_SCREENSHOTS`, or to pytest's temporary folder.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.conftest import Server, encoded, slow_except, start_server
from tests.playground.browser import LOOKS, Page, fits, needs_chromium, screenshot

pytestmark = needs_chromium

DROP = """
    const bytes = Uint8Array.from(atob(arguments[0]), (character) => character.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], arguments[1], {type: "image/png"}));
    for (const type of ["dragover", "drop"]) {
        document.body.dispatchEvent(new DragEvent(type, {dataTransfer: files, bubbles: true, cancelable: true}));
    }
"""
SHARES = """
    return [...document.querySelectorAll("td.heat")].map((cell) => cell.style.getPropertyValue("--share"));
"""
FIRST_PICTURES_ARE_SEEN = """
    return [...document.querySelectorAll(".result img")].slice(0, 6).every((image) => image.naturalWidth === 96);
"""


@pytest.fixture
def page(chromium: webdriver.Chrome, small_server: Server) -> Iterator[Page]:
    """The page, newly opened. At the end, the browser has logged only errors that tests provoke."""
    page = Page(chromium, small_server.url)
    page.open()
    yield page
    page.check_log()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = os.environ.get("PLAYGROUND_SCREENSHOTS")
    return Path(folder) if folder else tmp_path_factory.mktemp("screenshots")


@pytest.fixture(scope="module")
def swatch() -> bytes:
    return encoded(PIL.Image.new("RGB", (64, 64), "red"))


def vectors(server: Server, items: list[Any], **options: Any) -> NDArray[np.float64]:
    answer = httpx.post(f"{server.url}/embed", json={"items": items, **options}).json()
    return np.array([result["embedding"] for result in answer["results"]])


def test_texts_and_a_chosen_image_make_a_matrix(
    page: Page, small_server: Server, swatch: bytes, tmp_path: Path
) -> None:
    assert page.one("#example-note").is_displayed()
    (tmp_path / "swatch.png").write_bytes(swatch)
    page.add_text("red")
    page.add_text("green")
    page.one("#images").send_keys(str(tmp_path / "swatch.png"))
    shown = page.matrix(3)
    expected = vectors(small_server, ["red", "green", {"image": base64.b64encode(swatch).decode()}])
    pairs = ~np.eye(3, dtype=bool)
    similarities = expected @ expected.T
    np.testing.assert_allclose(shown[pairs], similarities[pairs], atol=0.0051)
    assert np.isnan(np.diag(shown)).all()
    lowest, highest = similarities[pairs].min(), similarities[pairs].max()
    shares = [float(share) for share in page.driver.execute_script(SHARES)]
    np.testing.assert_allclose(shares, (similarities[pairs] - lowest) / (highest - lowest), atol=0.01)
    assert page.texts("#lowest, #highest") == [f"{lowest:.2f}", f"{highest:.2f}"]
    assert page.texts("#items .what") == ["red", "green", "swatch.png"]
    first, second = divmod(int(np.argmax(np.triu(expected @ expected.T, 1))), 3)
    shown_as = ["A (red)", "B (green)", "C (swatch.png)"]
    assert f"Most similar: {shown_as[first]} and {shown_as[second]}" in page.one("#summary").text
    assert not page.one("#example-note").is_displayed()


def test_example_is_there_at_once_and_comes_back(page: Page) -> None:
    shapes = ["red circle", "green square", "blue triangle"]
    assert page.texts("#items .what") == [*shapes, *(f"{name}.png" for name in shapes)]
    for _ in range(6):
        page.one("#items button").click()
    assert page.one("#compare-empty").is_displayed()
    assert not page.one("#example-note").is_displayed()
    page.one("#example").click()
    page.matrix(6)
    page.wait(lambda: page.one("#example-note").is_displayed())
    assert not page.one("#compare-empty").is_displayed()


def test_dropped_images_and_removal(page: Page, swatch: bytes) -> None:
    page.add_text("red")
    page.add_text("green")
    page.driver.execute_script(DROP, base64.b64encode(swatch).decode(), "dropped.png")
    page.matrix(3)
    page.one("button[aria-label='Remove B: green']").click()
    page.matrix(2)
    assert page.texts("#items .what") == ["red", "dropped.png"]
    page.add_text("blue")
    page.matrix(3)
    assert page.texts("#items .key") == ["A", "C", "B"]


def test_fewer_dimensions_and_an_instruction_change_the_matrix(page: Page, small_server: Server) -> None:
    page.add_text("red")
    page.add_text("green")
    whole = page.matrix(2)[0, 1]
    page.choose_dimensions(64)
    page.one("#compare .more summary").click()
    page.one("#compare-instruction").send_keys("Find the color.", Keys.TAB)
    first, second = vectors(small_server, ["red", "green"], dimensions=64, instruction="Find the color.")
    page.wait(lambda: abs(page.matrix(2)[0, 1] - first @ second) <= 0.0051)
    assert abs(whole - first @ second) > 0.0051


def test_broken_image_shows_the_services_message_and_the_others_are_compared(page: Page, swatch: bytes) -> None:
    page.add_text("red")
    page.driver.execute_script(DROP, base64.b64encode(b"no picture").decode(), "<b>broken</b>.png")
    page.driver.execute_script(DROP, base64.b64encode(swatch).decode(), "whole.png")
    page.matrix(2)
    (message,) = page.texts(".item.failed .error")
    assert "image: not a JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, ICO or HEIC file" in message
    assert page.texts(".item.failed .what") == ["<b>broken</b>.png"]


def test_search_ranks_as_the_service_does_at_every_size(page: Page, small_server: Server) -> None:
    page.open_search()
    assert not page.one("#rerank-row").is_displayed(), "this service has no reranker"
    hint = "To rerank the first 24 results, start the service with EMBEDDER_MODEL=bundled EMBEDDER_RERANKER=bundled."
    assert page.one("#rerank-hint").text == hint
    page.one("#query").send_keys("red", Keys.ENTER)
    collection = httpx.get(f"{small_server.url}/playground/collection").json()["pictures"]
    whole = np.array([np.frombuffer(base64.b64decode(entry["vector"]), "<f4") for entry in collection], np.float64)
    seen = []
    for size in (192, 128, 64):
        page.choose_dimensions(size)
        (query,) = vectors(small_server, ["red"], dimensions=size)
        rows = whole[:, :size] / np.linalg.norm(whole[:, :size], axis=1, keepdims=True)
        scores = rows @ query
        shown = page.ranking()
        order = np.argsort(-scores, kind="stable")[: len(shown)]
        np.testing.assert_allclose([score for _, score in shown], scores[order], atol=0.0006)
        assert shown[0][0] == collection[order[0]]["name"]
        assert f"{size} dimensions" in page.one("#asked").text
        seen.append(shown)
    assert seen[0] != seen[1] != seen[2]
    page.wait(lambda: page.driver.execute_script(FIRST_PICTURES_ARE_SEEN))
    page.one("#more-results").click()
    assert len(page.ranking()) > len(seen[2])
    assert "Noto Emoji" in page.one("#attribution").text


def test_search_by_image_is_one_labeled_click_away(page: Page, tmp_path: Path) -> None:
    page.open_search()
    assert "Search by image" in page.one("label[for='query-image']").text
    (tmp_path / "swatch.png").write_bytes(encoded(PIL.Image.new("RGB", (64, 64), "red")))
    page.one("#query-image").send_keys(str(tmp_path / "swatch.png"))
    page.ranking()
    assert "swatch.png" in page.one("#asked").text


def test_a_drawing_finds_itself(page: Page, small_server: Server) -> None:
    page.open_search()
    name = httpx.get(f"{small_server.url}/playground/collection").json()["pictures"][9]["name"]
    described = json.loads(Path("embedder/demo/drawings.json").read_text(encoding="utf-8"))
    side = described["tile_pixels"]
    tile = PIL.Image.open("embedder/demo/drawings.png").crop((9 * side, 0, 10 * side, side))
    page.driver.execute_script(DROP, base64.b64encode(encoded(tile)).decode(), "tile.png")
    assert page.ranking()[0] == (name, 1.0)


def test_broken_query_shows_the_services_message(page: Page) -> None:
    page.open_search()
    page.driver.execute_script(DROP, base64.b64encode(b"%PDF-1.7").decode(), "paper.png")
    page.wait(lambda: page.texts("#search-state [role=alert]"))
    assert page.texts("#search-state [role=alert]")[0].startswith(
        "paper.png: image: not a JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, ICO or HEIC file, but a PDF document"
    )
    assert page.texts(".result") == []
    page.one("#query").send_keys("red", Keys.ENTER)
    assert page.ranking()
    assert not page.one("#search-state").is_displayed()


def throttle(page: Page, latency_ms: int) -> None:
    page.driver.set_network_conditions(  # type: ignore[no-untyped-call]
        offline=False, latency=latency_ms, throughput=10_000_000
    )


def test_slow_answer_shows_progress_and_can_be_cancelled(page: Page, screenshots: Path) -> None:
    throttle(page, 2500)
    try:
        page.add_text("red")
        page.add_text("green")
        page.wait(lambda: "Embedding" in page.one("#compare-state").text and " 1 s" in page.one("#compare-state").text)
        screenshot(page, screenshots / "slow.png")
        page.one("#compare-state button").click()
        page.wait(lambda: "Cancelled" in page.one("#compare-state").text)
    finally:
        throttle(page, 0)
    assert not page.one("#matrix-box").is_displayed()
    page.one("#compare-state button").click()  # Try again
    page.matrix(2)
    assert not page.one("#compare-state").is_displayed()


def test_page_waits_for_a_service_that_does_not_respond(page: Page) -> None:
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/health"]})
    try:
        page.driver.get(f"{page.url}/playground")
        page.wait(lambda: "does not respond" in page.one("#banner").text)
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.wait(lambda: page.all("#dimensions label"))
    assert not page.one("#banner").is_displayed()


def test_progress_is_shown_until_all_images_are_embedded(page: Page) -> None:
    body = {"status": "building 120 of 400", "num_done": 120, "num_pictures": 400, "pictures": [], "skipped": []}
    page.answer("playground/collection", {"status": 200, "body": body})
    page.one("#tab-search").click()
    page.wait(lambda: page.one("#building").text == "Embedding the images: 120 of 400.")
    assert page.one("#building-progress").get_attribute("value") == "120"
    assert not page.one("#search-box").is_displayed()
    page.wait(lambda: page.one("#search-box").is_displayed(), 120)
    assert not page.one("#collection-building").is_displayed()
    assert len(page.texts(".result .name")) == 24  # before the first query, as they come


def test_search_without_images_explains_the_setting(page: Page, server: Server) -> None:
    page.url = server.url
    page.open()
    page.one("#tab-search").click()
    page.wait(lambda: "EMBEDDER_DEMO_FOLDER=" in page.one("#collection-none").text)
    assert not page.one("#search-box").is_displayed()


def test_rejected_request_shows_the_services_message_and_can_be_retried(page: Page) -> None:
    error = {"code": "overloaded", "message": "9000 tokens wait; allowed: up to 64", "item": None, "type": "overloaded"}
    page.answer("embed", {"status": 429, "headers": {"retry-after": "3"}, "body": {"error": error}})
    page.add_text("red")
    page.wait(lambda: page.texts("#compare-state [role=alert]"))
    (message,) = page.texts("#compare-state [role=alert]")
    assert message == "Error from the service: 9000 tokens wait; allowed: up to 64 (retry after 3 s)"
    page.one("#compare-state button").click()
    page.wait(lambda: not page.one("#compare-state").is_displayed())
    page.add_text("green")
    page.matrix(2)


def test_copied_requests_run(page: Page, small_server: Server, swatch: bytes, tmp_path: Path) -> None:
    name, text = "it's $5.png", 'red "$HOME" `id` \\ ü'
    (tmp_path / name).write_bytes(swatch)
    page.add_text(text)
    page.one("#images").send_keys(str(tmp_path / name))
    page.matrix(2)
    page.choose_dimensions(64)
    expected = vectors(small_server, [text, {"image": base64.b64encode(swatch).decode()}], dimensions=64)
    curl = subprocess.run(["bash", "-c", page.code("curl")], cwd=tmp_path, capture_output=True, text=True, check=True)
    results = json.loads(curl.stdout)["results"]
    np.testing.assert_allclose([result["embedding"] for result in results], expected, atol=1e-6)
    command = [sys.executable, "-c", page.code("python")]
    python = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert python.stdout.count("'embedding': [") == 2
    page.one("#copy").click()
    assert page.wait(lambda: page.one("#copy").text == "Copied")


def test_tabs_and_dimensions_work_from_the_keyboard(page: Page) -> None:
    page.one("#tab-compare").send_keys(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element.get_attribute("id") == "tab-search"
    assert page.one("#tab-search").get_attribute("aria-selected") == "true"
    assert not page.one("#compare").is_displayed()
    page.one("#dimensions input[value='192']").send_keys(Keys.ARROW_LEFT)
    assert page.one("#dimensions input:checked").get_attribute("value") == "128"


@pytest.mark.parametrize("look", slow_except(LOOKS, "phone"))
def test_page_fits_every_screen_in_light_and_dark(look: str, page: Page, screenshots: Path) -> None:
    with page.looking(look) as (width, scheme):
        page.open()
        assert page.one("#scroll-hint").is_displayed() == (width < 500)
        fits(page, width)
        screenshot(page, screenshots / f"{look}-example.png")
        for text in ("red", "a text that is much longer than its column", "green", "blue", "white", "black", "gray"):
            page.add_text(text)
        page.driver.execute_script(DROP, base64.b64encode(b"%PDF-1.7").decode(), "paper.png")
        page.wait(lambda: page.texts(".item.failed"))
        page.matrix(7)
        fits(page, width)
        screenshot(page, screenshots / f"{look}-compare.png")
        page.open_search()
        page.one("#query").send_keys("red", Keys.ENTER)
        page.ranking()
        time.sleep(0.5)  # thumbnails
        fits(page, width)
        screenshot(page, screenshots / f"{look}-search.png")
    shown = PIL.Image.open(io.BytesIO((screenshots / f"{look}-search.png").read_bytes())).convert("L")
    assert (np.asarray(shown)[:, :8].mean() > 128) == (scheme == "light")


def test_key_form_looks_like_an_error_only_after_a_rejected_key(page: Page) -> None:
    page.answer("embed", *[{"status": 401, "body": {}}] * 2)
    page.add_text("red")
    page.wait(lambda: page.texts("#key-reason") == ["This service requires an API key."])
    assert "bad" not in str(page.one("#key-form").get_attribute("class"))
    page.one("#key").send_keys("wrong", Keys.ENTER)
    page.wait(lambda: page.texts("#key-reason") == ["The service rejected this API key."])
    assert "bad" in str(page.one("#key-form").get_attribute("class"))
    page.one("#key").send_keys("right", Keys.ENTER)
    assert page.one("#main").is_displayed()
    page.wait(lambda: not page.one("#key-form").is_displayed() and page.texts("#items .what") == ["red"])
    page.driver.execute_script("sessionStorage.clear()")


@pytest.mark.slow
def test_key_form_is_shown_and_the_key_is_sent_with_every_request(
    chromium: webdriver.Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(tmp_path, api_key="s3cret", access_log="true")
    page = Page(chromium, server.url)
    chromium.get(f"{server.url}/playground")
    for key, reason in (("wrong", "This service requires an API key."), ("s3cret", "The service rejected this")):
        page.wait(lambda reason=reason: page.texts("#key-reason")[0].startswith(reason))
        assert not page.one("#main").is_displayed()
        assert not page.one("#bar").is_displayed()
        assert ("bad" in str(page.one("#key-form").get_attribute("class"))) == reason.endswith("rejected this")
        page.one("#key").send_keys(key, Keys.ENTER)
    page.wait(lambda: page.all("#dimensions label"))
    assert not page.one("#key-form").is_displayed()
    assert page.one("#main").is_displayed()
    page.add_text("red")
    page.add_text("green")
    page.matrix(2)
    code = page.code("python")
    assert "s3cret" not in code + page.code("curl")
    monkeypatch.setenv("EMBEDDER_API_KEY", "s3cret")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("embedding") == 2
    page.open_search()
    page.wait(lambda: chromium.execute_script(FIRST_PICTURES_ARE_SEEN), 60)
    page.open()  # again, in the same tab
    assert not page.one("#key-form").is_displayed()
    chromium.get_log("browser")  # type: ignore[no-untyped-call]  # of the refused requests
    assert server.stop() == 0
    assert "s3cret" not in server.log.read_text()
