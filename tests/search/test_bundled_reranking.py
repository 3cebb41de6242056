"""The bundled models search pictures and pages in two stages, as docs/guides/rerank-search-results.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.vector_stores.drawings import write_drawings
from tests.search.conftest import Indexed, embed_with_the_bundled_model

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

from embedder.search.__main__ import main

pytestmark = pytest.mark.slow

NAMES = ["pizza", "full moon", "cactus", "sunrise over mountains"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `embedder.bulk` makes of the first 80 drawings, without Ray."""
    folder = tmp_path_factory.mktemp("drawings")
    write_drawings(folder / "pictures", 80)
    embed_with_the_bundled_model(folder / "pictures", folder / "vectors", rows_per_part=80)
    return folder / "vectors"


def reranked(capsys: pytest.CaptureFixture[str], output: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main([str(output), *arguments, "--rerank", "bundled", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [one["rerank_score"] for one in found] == sorted((one["rerank_score"] for one in found), reverse=True)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_name_finds_its_drawing(name: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reranked(capsys, pictures, name, "--limit", "3")
    assert found[0]["file"] == f"{name}.png"
    assert 0 < found[0]["rerank_score"] <= 1


@pytest.mark.parametrize("place", [(0, 1), (1, 3)])
def test_name_finds_the_page_with_its_drawing(
    place: tuple[int, int], indexed: Indexed, capsys: pytest.CaptureFixture[str]
) -> None:
    best = reranked(capsys, indexed.output, indexed.subjects[place[0]][place[1]])[0]
    assert (best["file"], best["page"]) == (f"reports/report-0{place[0] + 1}.pdf", place[1] + 1)
