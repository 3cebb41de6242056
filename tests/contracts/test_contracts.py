"""The contracts whose clients are in the `test` extra; `python -m tests.contracts` checks all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.contracts import ranking
from tests.contracts.behaviors import SOURCES
from tests.contracts.checks import CHECKS, Check, run

CHEAP = {"", "openai", "langchain_openai", "cohere", "huggingface_hub"}


@pytest.mark.parametrize("row", [row for row in CHECKS if row.needs in CHEAP], ids=lambda row: row.run.__name__)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Cohere's client leaves its connections open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_client_gets_the_vectors_of_the_native_route(row: Check, server: Server) -> None:
    assert run(row, server.url).error == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in CHECKS if row.environment == ranking.ENVIRONMENT], ids=lambda row: row.run.__name__
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_client_gets_the_ranking_of_the_native_route(row: Check, reranking_server: Server) -> None:
    assert run(row, reranking_server.url).error == ""


def test_outcome_of_a_check_that_fails_has_the_reason() -> None:
    def fail(url: str) -> None:
        raise AssertionError(f"no vectors from {url}")

    outcome = run(Check("OpenAI", "a check", "a client", "openai", fail), "http://nowhere")
    assert outcome.error == "AssertionError: no vectors from http://nowhere"


def test_every_row_has_a_source_and_an_environment() -> None:
    assert {row.environment for row in CHECKS} == {path.stem for path in Path(__file__).parent.glob("*.txt")}
    assert {row.source for row in CHECKS if not row.needs} == set(SOURCES.values())
