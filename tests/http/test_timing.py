"""Every route that embeds says where its time went."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from embedder.http.routes import DIALECTS

TIMES = ("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda one: f"{one.path} {one.summary[-20:]}")
def test_response_has_the_headers_with_times_and_tokens(dialect: Any, client: httpx.Client) -> None:
    body = next(iter(dialect.examples.values()))
    answer = client.post(dialect.path.replace("{model}", "any"), json=body)
    assert answer.status_code == 200
    times = {name: int(answer.headers[name]) for name in TIMES}
    assert min(times.values()) >= 0
    assert times["x-total-time"] + 1 >= times["x-tokenization-time"]  # rounded
    assert int(answer.headers["x-compute-tokens"]) > 0


def test_tokens_of_the_header_are_those_of_usage(client: httpx.Client) -> None:
    answer = client.post("/txt/embed", json={"input": ["red", "green and blue"]})
    assert int(answer.headers["x-compute-tokens"]) == answer.json()["usage"]["total_tokens"]
