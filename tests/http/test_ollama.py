"""Bodies of Ollama's clients that have nothing to embed: they ask Ollama to load a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.mark.parametrize("body", [{}, {"input": None}, {"input": ""}, {"input": []}], ids=str)
def test_no_input_gets_no_vectors(body: dict[str, Any], http: httpx.Client) -> None:
    response = http.post("/api/embed", json={"model": "any", "keep_alive": 0, **body})
    assert response.status_code == 200, response.text
    assert (response.json()["embeddings"], response.json()["prompt_eval_count"]) == ([], 0)


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": ""}], ids=str)
def test_no_prompt_gets_an_empty_vector(body: dict[str, Any], http: httpx.Client) -> None:
    response = http.post("/api/embeddings", json={"model": "any", **body})
    assert (response.status_code, response.json()) == (200, {"embedding": []})


def test_empty_text_in_a_list_is_an_error(http: httpx.Client) -> None:
    response = http.post("/api/embed", json={"model": "any", "input": ["red", ""]})
    assert (response.status_code, response.json()["error"][:21]) == (400, "item 1: text is empty")
    assert http.post("/api/embed", json={"model": "any", "input": [""]}).status_code == 400


def test_zero_dimensions_are_all_dimensions(http: httpx.Client) -> None:
    zero, not_given = (
        http.post("/api/embed", json={"model": "any", "input": "red", **size}).json()["embeddings"]
        for size in ({"dimensions": 0}, {})
    )
    assert zero == not_given
