"""What README.md and docs/ promise about the bundled model and the first user's client."""

from __future__ import annotations

import base64
import inspect

import httpx
import matplotlib.colors
import numpy as np
import PIL.Image
import pytest
import yaml

from embedder import errors
from tests.conftest import ROOT, Server, encoded
from tests.docs.markdown import blocks

LOCAL = ROOT / "docs" / "api" / "local.md"
START = ROOT / "docs" / "operations" / "start-stop-logs.md"


def swatch(color: str) -> str:
    return base64.b64encode(encoded(PIL.Image.new("RGB", (64, 64), color))).decode()


def test_service_says_that_it_serves_the_bundled_model(small_server: Server) -> None:
    info = httpx.get(f"{small_server.url}/info", timeout=60).json()
    assert info["is_bundled_model"] is True
    assert info["model"] == "bundled"
    assert "EMBEDDER_MODEL=Qwen/Qwen3-VL-Embedding-2B" in small_server.log.read_text()


def test_start_ends_with_the_line_that_is_shown(small_server: Server) -> None:
    (shown,) = [block.text for block in blocks(START) if "startup hook" in block.text]
    _, _, line = shown.strip().partition(" ")  # without the time
    assert " loaded in " in small_server.log.read_text().partition(f"{line}\n")[0]
    assert f"{line}\n" in small_server.log.read_text()


def test_models_yaml_entry_drives_the_benchmarks_client(small_server: Server) -> None:
    """The client of the first user's benchmark, as the contract describes it."""
    (block,) = [block for block in blocks(LOCAL) if block.language == "yaml"]
    (entry,) = yaml.safe_load(block.text).values()
    endpoints = [entry["text_endpoint"], entry["image_endpoint"]]
    assert [endpoint["path"] for endpoint in endpoints] == ["/txt/embed", "/img/embed"]
    document = httpx.get(f"{small_server.url}/openapi.json", timeout=60).json()
    for endpoint, value in zip(endpoints, ("red", swatch("red")), strict=True):
        path, input_field, output_field = endpoint["path"], endpoint["input_field"], endpoint["output_field"]
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"][input_field]
        assert any(option["type"] == "array" and option["maxItems"] > 1 for option in schema["anyOf"])
        single = httpx.post(f"{small_server.url}{path}", json={input_field: value}, timeout=60).json()[output_field]
        batch_field = "inputs" if path == "/img/embed" else input_field
        batch = httpx.post(f"{small_server.url}{path}", json={batch_field: [value, value]}, timeout=60).json()[
            output_field
        ]
        np.testing.assert_allclose(batch, [single, single], atol=1e-6)


@pytest.mark.slow
def test_red_is_nearest_to_the_red_swatch_of_949(small_server: Server) -> None:
    colors = list(matplotlib.colors.XKCD_COLORS.values())
    assert len(colors) == 949
    swatches = [swatch(color) for color in colors]
    vectors: list[list[float]] = []
    for start in range(0, len(swatches), 100):
        body = {"input": swatches[start : start + 100]}
        vectors += httpx.post(f"{small_server.url}/img/embed", json=body, timeout=120).json()["embedding"]
    red = np.array(httpx.post(f"{small_server.url}/txt/embed", json={"input": "red"}, timeout=60).json()["embedding"])
    assert np.linalg.norm(red) == pytest.approx(1, abs=1e-6)
    assert colors[int(np.argmax(np.array(vectors) @ red))] == matplotlib.colors.XKCD_COLORS["xkcd:red"]


def test_every_error_code_is_explained_in_troubleshooting_or_errors() -> None:
    tree = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.EmbedderError)]
    sent = {kind.code for kind in tree} - {errors.ModelUnavailable.code}
    reference = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    assert {code for code in sent if f"`{code}`" not in reference} == set()
    statuses = {str(kind.status) for kind in tree} - {"404", "405"}
    troubleshooting = (ROOT / "docs" / "operations" / "troubleshooting.md").read_text(encoding="utf-8")
    assert {status for status in statuses if f"\n### {status}" not in troubleshooting} == set()
