"""Chromium, and the playground in it, for the tests that look at the page."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium with its driver (apt: chromium-driver)"
)
# width, height and color scheme
LOOKS = {
    "desktop-light": (1280, 900, "light"),
    "desktop-dark": (1280, 900, "dark"),
    "phone": (390, 844, "light"),
    "phone-dark": (390, 844, "dark"),
}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,900"
)
FAKE_ANSWERS = """
    const [path, answers] = [%s, %s];
    const real = window.fetch;
    window.fetch = (url, options) => {
        const answer = String(url) === path ? answers.shift() : undefined;
        return answer ? Promise.resolve(new Response(JSON.stringify(answer.body), answer)) : real(url, options);
    };
"""


@contextmanager
def open_chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The open playground."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self) -> None:
        self.driver.get(f"{self.url}/playground")
        self.wait(lambda: self.all("#dimensions label"))
        self.matrix(6)  # of the example
        self.wait(lambda: not self.one("#compare-state").is_displayed())

    def open_collection(self, num_pages: int) -> None:
        """Open the page of `embedder.search --serve`, which first shows this many results."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.url}/")
        self.wait(lambda: len(self.all(".page")) == num_pages)

    def check_log(self) -> None:
        """The browser has logged no error of the page, except failed requests, which tests provoke."""
        complaints = [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        assert [message for message in complaints if "Failed to load resource" not in message] == []

    def wait(self, condition: Callable[[], Any], seconds: float = 30) -> Any:
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText.trim())"
        found: list[str] = self.driver.execute_script(script, selector)
        return found

    def answer(self, path: str, *answers: dict[str, Any]) -> None:
        """Respond to the next requests to `path` with `answers`; later ones reach the service."""
        self.driver.execute_script(FAKE_ANSWERS % (json.dumps(path), json.dumps(answers)))

    def add_text(self, text: str) -> None:
        self.one("#text").send_keys(text, Keys.ENTER)

    def matrix(self, size: int) -> NDArray[np.float64]:
        """The similarities; NaN on the diagonal, which the page leaves blank."""
        self.wait(lambda: len(self.texts("#matrix tbody td")) == size**2)
        cells = self.texts("#matrix tbody td")
        return np.array([cell or "nan" for cell in cells], np.float64).reshape(size, size)

    def open_search(self) -> None:
        self.one("#tab-search").click()
        self.wait(lambda: self.one("#search-box").is_displayed(), 120)

    def ranking(self) -> list[tuple[str, float]]:
        self.wait(lambda: self.texts(".result .value") and not self.one("#search-state").is_displayed())
        return list(zip(self.texts(".result .name"), map(float, self.texts(".result .value")), strict=True))

    def ask(self, question: str) -> None:
        """Search pages of documents."""
        self.one("#query").clear()
        self.one("#query").send_keys(question, Keys.ENTER)
        self.wait(lambda: question in self.one("#asked").text and self.all(".page .value"))

    def choose_dimensions(self, size: int) -> None:
        self.one(f"#dimensions label:has(> input[value='{size}'])").click()

    def code(self, language: str) -> str:
        self.one(f"label:has(> input[value={language}])").click()
        return str(self.driver.execute_script("return document.getElementById('code').textContent"))

    @contextmanager
    def looking(self, look: str) -> Iterator[tuple[int, str]]:
        """Emulate one of `LOOKS` in the block. Yields its width and color scheme."""
        width, height, scheme = LOOKS[look]
        command = self.driver.execute_cdp_cmd
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        command("Emulation.setDeviceMetricsOverride", metrics)
        command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        try:
            yield width, scheme
        finally:
            command("Emulation.clearDeviceMetricsOverride", {})
            command("Emulation.setEmulatedMedia", {"features": []})


def screenshot(page: Page, path: Path) -> None:
    """The whole page."""
    options = {"captureBeyondViewport": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(page.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


def fits(page: Page, width: int) -> None:
    """Only the matrix, in its own scroll box, may be wider than the screen."""
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
