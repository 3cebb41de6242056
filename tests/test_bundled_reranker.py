"""The bundled reranker: its name, its scores against plain transformers, and how it ranks the demo drawings."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from benchmarks.drawings import drawings_of_the_demo
from embedder import Embedder, Reranker
from embedder.model.checkpoint import BUNDLED_RERANKER
from tests.conftest import Server, encoded, picture
from tests.rerank_oracle import RerankOracle

MAX_DIFFERENCE = 1e-5  # of a score, float32, against the oracle
NUM_CANDIDATES = 24
NAMES = ["pizza", "guitar", "cactus", "rainbow", "key", "strawberry"]  # only reranking ranks the last two first


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    with Reranker(device="cpu") as reranker:
        yield reranker


@pytest.fixture(scope="module")
def drawings() -> dict[str, PIL.Image.Image]:
    return dict(zip(*drawings_of_the_demo(), strict=True))


@pytest.fixture(scope="module")
def candidates(drawings: dict[str, PIL.Image.Image]) -> dict[str, list[str]]:
    """The drawings that the bundled embedding model finds for each of `NAMES`, the most similar first."""
    with Embedder(device="cpu") as embedder:
        vectors = embedder.embed_document(list(drawings.values()))
        scores = vectors @ embedder.embed_query(NAMES).T
    best = np.argsort(-scores, axis=0)[:NUM_CANDIDATES].T
    return {name: [list(drawings)[place] for place in places] for name, places in zip(NAMES, best, strict=True)}


def test_name_bundled_and_no_name_load_it(reranker: Reranker) -> None:
    info = reranker.info()
    assert (info["model"], info["is_bundled_model"], info["roles"]) == ("bundled-reranker", True, ["reranker"])
    assert info["dtype"] == "float32", "also on processors that multiply bfloat16"
    with Reranker("bundled", device="cpu") as named:
        assert named.score("red", ["a red square"]) == reranker.score("red", ["a red square"])


def test_checkpoint_is_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in BUNDLED_RERANKER.rglob("*") if path.is_file()) <= 10_500_000


def test_scores_equal_plain_transformers(reranker: Reranker, drawings: dict[str, PIL.Image.Image]) -> None:
    """Of texts, drawings and mixtures, as queries and as documents."""
    oracle = RerankOracle(BUNDLED_RERANKER)
    mixture = {"image": drawings["cactus"], "text": "red"}
    queries: list[Any] = ["a slice of pizza", {"image": drawings["castle"]}, mixture]
    documents: list[Any] = [
        "pizza",
        {"image": drawings["pizza"]},
        {"image": drawings["castle"], "text": "a castle"},
        {"image": [drawings["cactus"], PIL.Image.new("RGB", (64, 64), "red")]},
        {"image": picture(200, 90, 1)},
    ]
    expected = np.array([[oracle.score(query, document) for document in documents] for query in queries])
    scores = np.array([reranker.score(query, documents) for query in queries])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=MAX_DIFFERENCE)
    assert len({round(one, 4) for one in scores.flat}) > len(scores.flat) // 2, "or the comparison proves little"


@pytest.mark.parametrize("name", NAMES)
def test_route_ranks_the_right_drawing_first(
    name: str,
    candidates: dict[str, list[str]],
    drawings: dict[str, PIL.Image.Image],
    reranker: Reranker,
    bundled_pair_server: Server,
) -> None:
    found = sorted(candidates[name])  # the order by similarity would give the answer away
    images = [base64.b64encode(encoded(drawings[one])).decode() for one in found]
    body = {"query": name, "documents": [{"image": image} for image in images], "top_n": 3}
    answer = httpx.post(f"{bundled_pair_server.url}/rerank", json=body, timeout=60).json()
    assert answer["model"] == "bundled-reranker"
    assert found[answer["results"][0]["index"]] == name
    ranking = reranker.rank(name, [drawings[one] for one in found], top_n=3)
    assert [one["index"] for one in answer["results"]] == [one.index for one in ranking]
    assert [one["score"] for one in answer["results"]] == pytest.approx([one.score for one in ranking], abs=1e-5)


def test_service_lists_both_bundled_models(bundled_pair_server: Server) -> None:
    models = httpx.get(f"{bundled_pair_server.url}/v1/models", timeout=60).json()["data"]
    assert [one["id"] for one in models] == ["bundled", "bundled-reranker"]
    info = httpx.get(f"{bundled_pair_server.url}/info", timeout=60).json()
    assert (info["is_bundled_model"], info["reranker"]["is_bundled_model"]) == (True, True)
    assert "set EMBEDDER_RERANKER=Qwen/Qwen3-VL-Reranker-2B" in bundled_pair_server.log.read_text()
