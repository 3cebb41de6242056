"""The README keeps its word: its commands run, its snippets run, its tables are the code's."""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import matplotlib.colors
import numpy as np
import PIL.Image
import pytest

from embedder import errors
from embedder.settings import settings_table
from tests.conftest import ROOT, Server, encoded, start_server

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service as a newcomer starts it: no settings."""
    server = start_server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0


def assert_is_the_shown_answer(answer: str) -> None:
    """The README shows the first values; the rest of the answer is as shown."""
    (shown,) = blocks("text")
    body = json.loads(answer)
    values = [float(value) for value in re.findall(r"-?\d\.\d+", shown)]
    assert len(values) >= 3
    np.testing.assert_allclose(body["embedding"][: len(values)], values, atol=2e-3)
    rest = {name: value for name, value in body.items() if name != "embedding"}
    assert json.dumps(rest, separators=(",", ":"))[1:] in shown


def test_request_gives_the_answer_that_is_shown(default_server: Server) -> None:
    curl = next(block for block in blocks("sh") if block.startswith("curl"))
    command = curl.replace("localhost:3000", default_server.url.removeprefix("http://"))
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert_is_the_shown_answer(run.stdout)


@pytest.mark.parametrize(
    "snippet", blocks("python"), ids=lambda snippet: re.findall(r"(?:import|from) (\w+)", snippet)[-1]
)
def test_python_snippet_prints_what_it_says(snippet: str, default_server: Server, tmp_path: Path) -> None:
    """What stands behind `#` in the line of a `print` is what it prints, numbers to two digits."""
    (command,) = [block for block in blocks("sh") if "swatch.png" in block]
    subprocess.run(["bash", "-c", command.replace(".venv/bin/python", sys.executable)], cwd=tmp_path, check=True)
    code = snippet.replace("http://localhost:3000", default_server.url)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    promised = " ".join(re.findall(r"^print\(.*  # (.+)$", snippet, re.MULTILINE)).split()
    assert promised
    assert [float(value) for value in run.stdout.split()] == pytest.approx(
        [float(value) for value in promised], abs=0.01
    )


def test_small_model_says_what_it_is(default_server: Server) -> None:
    assert httpx.get(f"{default_server.url}/info").json()["is_bundled_model"] is True
    assert "serving the small model shipped in the package" in default_server.log.read_text()


def test_models_yaml_entry_drives_the_benchmarks_client(default_server: Server) -> None:
    """The client of the first user's benchmark, as the contract describes it."""
    (entry,) = blocks("yaml")
    endpoints = re.findall(r"path: (\S+), method: POST, input_field: (\w+), output_field: (\w+)", entry)
    assert [path for path, _, _ in endpoints] == ["/txt/embed", "/img/embed"]
    document = httpx.get(f"{default_server.url}/openapi.json").json()
    swatch = base64.b64encode(encoded(PIL.Image.new("RGB", (64, 64), "red"))).decode()
    for (path, input_field, output_field), value in zip(endpoints, ("red", swatch), strict=True):
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"][input_field]
        assert any(option["type"] == "array" and option["maxItems"] > 1 for option in schema["anyOf"])
        single = httpx.post(f"{default_server.url}{path}", json={input_field: value}).json()[output_field]
        batch_field = "inputs" if path == "/img/embed" else input_field
        batch = httpx.post(f"{default_server.url}{path}", json={batch_field: [value, value]}).json()[output_field]
        np.testing.assert_allclose(batch, [single, single], atol=1e-6)


def test_red_is_nearest_to_the_red_swatch_of_949(default_server: Server) -> None:
    colors = list(matplotlib.colors.XKCD_COLORS.values())
    assert len(colors) == 949
    swatches = [base64.b64encode(encoded(PIL.Image.new("RGB", (64, 64), color))).decode() for color in colors]
    vectors: list[list[float]] = []
    for start in range(0, len(swatches), 100):
        answer = httpx.post(
            f"{default_server.url}/img/embed", json={"input": swatches[start : start + 100]}, timeout=120
        )
        vectors += answer.json()["embedding"]
    red = np.array(httpx.post(f"{default_server.url}/txt/embed", json={"input": "red"}).json()["embedding"])
    assert np.linalg.norm(red) == pytest.approx(1, abs=1e-6)
    assert colors[int(np.argmax(np.array(vectors) @ red))] == matplotlib.colors.XKCD_COLORS["xkcd:red"]


def test_settings_table_is_the_codes() -> None:
    assert settings_table() in README


def test_every_error_code_is_in_the_table() -> None:
    tree = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.EmbedderError)]
    sent = {kind.code for kind in tree} - {errors.ModelUnavailable.code}
    table = README[README.index("## Errors") : README.index("## How it works")]
    assert sent <= set(re.findall(r"`(\w+)`", table))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_start_command_serves_from_a_fresh_clone(tmp_path: Path) -> None:
    """Command one as written, and the request as written: installs for minutes, so CI runs it by itself."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    serve, curl = blocks("sh")[:2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EMBEDDER_", "VIRTUAL"))}
    process = subprocess.Popen(["bash", "-c", serve], cwd=tmp_path / "clone", env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get("http://localhost:3000/readyz", timeout=2).status_code == 200:
                    break
            time.sleep(1)
        run = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
        assert_is_the_shown_answer(run.stdout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
