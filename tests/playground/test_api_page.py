"""The page at `/`, on which the routes can be tried, in Chromium."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from selenium import webdriver

from tests.conftest import Server, slow_except
from tests.playground.browser import LOOKS, Page, fits, needs_chromium, screenshot


def test_page_has_a_title_a_size_for_phones_and_a_link_to_the_playground(client: httpx.Client) -> None:
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    for part in ("<title>API · Qwen3-VL-Embedding</title>", 'name="viewport"', '<a href="playground">'):
        assert part in response.text
    assert client.head("/").status_code == 200
    assert client.put("/", json={}).status_code == 405
    assert "googletagmanager" not in response.text


@needs_chromium
@pytest.mark.parametrize("look", slow_except(LOOKS, "phone"))
def test_page_lists_the_routes_in_groups_on_every_screen(
    look: str, chromium: webdriver.Chrome, small_server: Server, tmp_path: Path
) -> None:
    page = Page(chromium, small_server.url)
    with page.looking(look) as (width, _):
        page.driver.get(f"{page.url}/")
        page.wait(lambda: page.all(".opblock"))
        tags = [tag["name"] for tag in httpx.get(f"{page.url}/openapi.json").json()["tags"]]
        assert [title.split("\n")[0] for title in page.texts(".opblock-tag")] == tags
        fits(page, width)
        screenshot(page, Path(os.environ.get("PLAYGROUND_SCREENSHOTS") or tmp_path) / f"{look}-api.png")
        page.one(".opblock-summary").click()
        page.wait(lambda: page.all(".opblock-body"))
        screenshot(page, Path(os.environ.get("PLAYGROUND_SCREENSHOTS") or tmp_path) / f"{look}-api-open.png")
        fits(page, width)
        page.one("nav a").click()
        page.wait(lambda: page.all("#dimensions label"))
    page.check_log()
