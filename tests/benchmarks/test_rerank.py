"""`benchmarks.rerank`: the peers are asked for the same tokens, and wrong scores end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import goals, rerank
from benchmarks.compare import WrongVectors
from benchmarks.peers import Peer
from benchmarks.workloads import Item
from embedder import Reranker
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.pairs import Query, pair_with

WORDS = ["red", "green", "blue", "cyan"]


@pytest.mark.parametrize("in_parts", [False, True])
def test_peers_are_asked_for_the_tokens_of_the_library(in_parts: bool, reranker: Reranker) -> None:
    texts = {"query": "a green car", "document": "The car\nis green."}
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
        for role, text in texts.items()
    ]
    prompt = jinja2.Environment(autoescape=False).from_string(rerank.TEMPLATE).render(messages=messages)
    preprocess = reranker.models.preprocessor
    query = Query((Text(texts["query"]),))
    pair = preprocess(pair_with(query, preprocess(query), EmbeddingItem((Text(texts["document"]),))))
    # as text, a special token's name is not one token
    preprocess.tokenizer.encode_special_tokens = False
    try:
        assert preprocess.tokenizer.encode(prompt).ids == pair.input_ids.tolist()
    finally:
        preprocess.tokenizer.encode_special_tokens = True


def peer(name: str, error: float) -> Peer:
    """Scores that depend on the documents, wrong by `error`."""

    def score(items: list[Item]) -> NDArray[np.float32]:
        return np.array([len(one["text"]) / 1000 + error for one in items[1:]], np.float32)

    return Peer(name, score)


def measure(error: float) -> dict[str, Any]:
    contestants = [peer(rerank.LIBRARY, 0), peer(rerank.CROSS_ENCODER, error)]
    return rerank._measure(rerank.Workload("query", "text-16", 5), contestants, WORDS, 2)


def test_other_scores_than_the_librarys_end_the_run() -> None:
    assert measure(0.9 * rerank.MAX_DIFFERENCE)["who"][rerank.CROSS_ENCODER]["max_difference"] > 0
    for error in (1.1 * rerank.MAX_DIFFERENCE, float("nan")):
        with pytest.raises(WrongVectors, match="the scores of CrossEncoder differ"):
            measure(error)


def test_every_round_has_a_new_query_and_new_documents() -> None:
    workload = rerank.Workload("query", "text-64", 5)
    texts = [item["text"] for number in range(3) for item in workload.items(WORDS * 50, number)]
    assert len(set(texts)) == len(texts) == 18
    pictures = rerank.WORKLOADS["text query, pictures"]
    first, second = ({one["image"] for one in pictures.items(WORDS, number)[1:]} for number in range(2))
    assert len(first | second) == 2 * pictures.num_documents


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_command_compares_library_service_and_cross_encoder(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="the peers come with the `bench` extra")
    rerank.main(["--shape", "tiny", "--documents", "4", "--rounds", "1", "--results", str(tmp_path)])
    text = (tmp_path / "rerank-tiny.json").read_text()
    assert str(tmp_path) not in text
    for row in json.loads(text)["workloads"]:
        assert set(row["who"]) == {rerank.LIBRARY, rerank.CROSS_ENCODER, rerank.SERVICE}
    (tmp_path / "rerank-tiny.json").rename(tmp_path / "rerank-small.json")
    rows = {goal.what: goal.row(tmp_path)[2] for goal in goals.GOALS if goal.file == goals.RANKINGS}
    assert [figure == goals.NOT_MEASURED for figure in rows.values()] == [False, True]  # vLLM is left out
