"""Scores against plain transformers, and what they must not depend on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedder import Embedder, Reranker, loaded_model
from embedder.engine.ranking import best_first
from embedder.errors import EmbedderError, InputTooLong, InvalidMedia, InvalidRequest, ModelUnavailable
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.pairs import KEYS_PER_TOKEN, Query, pair_with
from embedder.loaded_model import parts_by_keys
from embedder.model.forward import Forward
from embedder.model.packing import PackedBatch, PackedPatches
from embedder.model.vision import Vision
from tests.conftest import picture, slow_except, words
from tests.inputs.test_video import clip
from tests.rerank_oracle import RerankOracle

MAX_DIFFERENCE = 1e-5  # of a score, float32, against the oracle
MAX_BATCH_DIFFERENCE = 1e-6  # of a score alone and among others

INSTRUCTION = "Retrieve images or text relevant to the user's query."

QUERIES: dict[str, Any] = {
    "text": "a green car in front of a yellow house",
    "long text with breaks": f"\n{words(150)}?\n\n",
    "image": {"image": picture(120, 90, 1)},
    "images and text": {"image": [picture(64, 64, 2), picture(200, 64, 3)], "text": "the same, at night"},
    "clip": {"video": [picture(64, 64, seed) for seed in range(4)]},
}
DOCUMENTS: dict[str, Any] = {
    "text": "The car is green.",
    "text that begins with punctuation": ":>\n\n- 猫は赤い 🟥",
    "spaces": "  ",
    "long text": words(400, 1),
    "image": {"image": picture(90, 200, 4)},
    "image and text": {"image": picture(333, 120, 5), "text": "what the picture shows"},
    "clip and text": {"video": [picture(128, 64, seed) for seed in range(5)], "text": "what moves"},
    "mixed order": {
        "content": [
            {"type": "text", "text": "before "},
            {"type": "image", "image": picture(60, 60, 6)},
            {"type": "text", "text": " between\n"},
            {"type": "image", "image": picture(100, 40, 7)},
            {"type": "text", "text": " after"},
        ]
    },
}


@pytest.fixture(scope="module")
def oracle(random_reranker: Path) -> RerankOracle:
    return RerankOracle(random_reranker)


@pytest.mark.parametrize("name", slow_except(QUERIES, "images and text", "clip"))
def test_scores_equal_the_reference(name: str, reranker: Reranker, oracle: RerankOracle) -> None:
    documents = list(DOCUMENTS.values())
    instruction = INSTRUCTION if name == "text" else None
    expected = [oracle.score(QUERIES[name], document, instruction) for document in documents]
    scores = reranker.score(QUERIES[name], documents, instruction=instruction)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=MAX_DIFFERENCE)
    alone = [reranker.score(QUERIES[name], [one], instruction=instruction)[0] for one in documents[::3]]
    np.testing.assert_allclose(alone, scores[::3], rtol=0, atol=MAX_BATCH_DIFFERENCE)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([40, 40, 40, 40], [[40, 40], [40, 40]]),
        ([100, 1, 99, 1], [[100], [1, 99], [1]]),
        ([500, 500, 10], [[500], [500], [10]]),  # a pair with more keys is computed by itself
        ([7], [[7]]),
    ],
)
def test_pairs_are_computed_in_parts_of_limited_keys(lengths: list[int], expected: list[list[int]]) -> None:
    pairs: Any = [SimpleNamespace(num_tokens=length) for length in lengths]
    assert [[one.num_tokens for one in part] for part in parts_by_keys(pairs, 100)] == expected


def test_long_query_with_many_documents_is_computed_in_parts_with_the_same_scores(
    random_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, documents = words(400), [words(4, number) for number in range(40)]
    calls: list[int] = []
    compute = Forward.__call__

    def count(self: Forward, batch: PackedBatch, *arguments: Any) -> Any:
        assert batch.key_index is not None
        calls.append(len(batch.key_index))
        return compute(self, batch, *arguments)

    monkeypatch.setattr(Forward, "__call__", count)
    with Reranker(str(random_reranker), device="cpu", max_batch_tokens=8192) as reranker:
        together = reranker.score(query, documents)
        monkeypatch.setattr(loaded_model, "MIN_KEYS", 2048)
        assert reranker.models.reranker is not None
        reranker.models.reranker.settings = reranker.models.settings.model_copy(update={"max_batch_tokens": 512})
        before = sum(calls)
        calls.clear()
        parts = reranker.score(query, documents)
    assert max(calls) <= 2048
    assert sum(calls) == before
    np.testing.assert_allclose(parts, together, rtol=0, atol=MAX_BATCH_DIFFERENCE)


def test_pair_costs_its_own_tokens_and_a_share_of_its_query(random_reranker: Path) -> None:
    with Reranker(str(random_reranker), device="cpu") as reranker:
        preprocess = reranker.models.preprocessor
        pairs = {}
        for num_words in (10, 2000):
            query = Query((Text(words(num_words)),), num_documents=1000)
            prepared = preprocess(query)
            pairs[num_words] = preprocess(pair_with(query, prepared, EmbeddingItem((Text("red"),))))
            own = pairs[num_words].num_tokens - prepared.num_tokens
            shares = prepared.num_tokens / 1000 + prepared.num_tokens / KEYS_PER_TOKEN
            assert own + shares <= pairs[num_words].cost < own + shares + 3
        model = reranker.models.reranker
        assert model is not None
        halves = model._halves([pairs[2000]] * 30)
    assert halves is None if torch.get_num_threads() % 2 else [len(half) for half in halves or ()] == [15, 15]


def test_random_scores_differ_by_far_more_than_the_tolerance(reranker: Reranker) -> None:
    """Or the tests above would prove nothing."""
    scores = np.array([reranker.score(query, DOCUMENTS.values()) for query in QUERIES.values()])
    assert len({round(float(one), 4) for one in scores.flat}) > 30
    assert 0.001 < scores.min() < scores.max() < 0.999


@pytest.mark.parametrize("name", ["text", "image and text", "clip and text"])
def test_text_that_is_too_long_is_cut_as_in_the_reference(
    name: str, random_reranker: Path, oracle: RerankOracle
) -> None:
    """`max_length` of the reference does not count the last five tokens; `max_input_tokens` counts all."""
    visual = (
        {} if name == "text" else {key: DOCUMENTS[name][key] for key in ("image", "video") if key in DOCUMENTS[name]}
    )
    documents = [{**visual, "text": words(300, 5)}, "short", {**visual, "text": words(500, 6)}]
    with Reranker(str(random_reranker), device="cpu", max_input_tokens=300 + oracle.num_tail) as reranker:
        scores = reranker.score(QUERIES["text"], documents)
        alone = reranker.score(QUERIES["text"], documents[:1])
    expected = [oracle.score(QUERIES["text"], one, max_length=300) for one in documents]
    np.testing.assert_allclose([*scores, *alone], [*expected, expected[0]], rtol=0, atol=MAX_DIFFERENCE)
    assert abs(expected[0] - oracle.score(QUERIES["text"], documents[0])) > 10 * MAX_DIFFERENCE


def test_query_that_leaves_nothing_for_a_document_is_an_error(random_reranker: Path) -> None:
    with Reranker(str(random_reranker), device="cpu", max_input_tokens=256) as reranker:
        with pytest.raises(
            InputTooLong, match=r"^query: \d+ tokens of query, instruction and template; allowed: \d+, because"
        ):
            reranker.score(words(300), ["red"])
        with pytest.raises(InputTooLong, match=r"cannot be cut; allowed: \d+"):
            reranker.score("red", [{"image": picture(400, 400)}])


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["checkpoint", "reference"])
def test_clips_and_large_pictures_equal_the_reference_in_both_regimes(
    regime: Literal["checkpoint", "reference"], random_reranker: Path
) -> None:
    """Clips and lists of frames are sampled, and large and small pictures resized, as each regime does."""
    oracle = RerankOracle(random_reranker, regime=regime)
    documents: list[dict[str, Any]] = [
        {"video": clip(num_frames=60, width=96, height=64), "text": "what moves"},
        {"video": clip(num_frames=8, rate=2, width=130, height=70), "fps": 2.0},
        {"video": [picture(64, 64, seed) for seed in range(70)]},
        {"image": [picture(40, 30), picture(1500, 300)]},
    ]
    queries = ["a moving bar", {"video": clip(num_frames=30, width=96, height=64), "text": "like this"}]
    with Reranker(str(random_reranker), device="cpu", preprocessing=regime) as reranker:
        for query in queries:
            expected = [oracle.score(query, document) for document in documents]
            scores = reranker.score(query, documents)
            np.testing.assert_allclose(scores, expected, rtol=0, atol=MAX_DIFFERENCE)
            assert len({round(score, 4) for score in scores}) == len(documents)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_both_pixel_regimes_and_both_kinds_of_head_equal_the_reference(
    tied: bool, write_reranker: Callable[..., Path]
) -> None:
    folder, large = write_reranker(tied=tied), {"image": picture(1500, 1300)}
    max_pixels = 1_843_200 if tied else 1_310_720
    expected = RerankOracle(folder, max_pixels).score("a picture", large)
    with Reranker(str(folder), device="cpu", max_pixels=max_pixels) as reranker:
        assert reranker.score("a picture", [large])[0] == pytest.approx(expected, abs=MAX_DIFFERENCE)


def test_checkpoint_for_classification_has_its_direction_stored(random_reranker: Path, tmp_path: Path) -> None:
    """vLLM's form: one row of weights for "yes" minus those for "no"."""
    folder = shutil.copytree(random_reranker, tmp_path / "converted")
    weights = load_file(folder / "model.safetensors")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    head = weights.pop("lm_head.weight")
    weights["score.weight"] = (head[vocabulary["yes"]] - head[vocabulary["no"]])[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen3VLForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    documents = ["The car is green.", DOCUMENTS["image"]]
    with Reranker(str(folder), device="cpu") as converted, Reranker(str(random_reranker), device="cpu") as original:
        assert converted.score("a car", documents) == pytest.approx(original.score("a car", documents), abs=1e-6)


def test_tokens_that_the_tokenizer_appends_follow_the_prompt(random_reranker: Path, tmp_path: Path) -> None:
    """As the embedding models' tokenizer appends `<|endoftext|>`; transformers reads the score there."""
    folder = shutil.copytree(random_reranker, tmp_path / "appending")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (end,) = [one["id"] for one in tokenizer["added_tokens"] if one["content"] == "<|endoftext|>"]
    appended = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": appended,
        "pair": [*appended[:1], {"Sequence": {"id": "B", "type_id": 0}}, *appended[1:]],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_against_oracle(folder, random_reranker)


def test_weights_stored_in_fp8_are_cast(random_reranker: Path, tmp_path: Path) -> None:
    """Without scales, each value is what it says, as for transformers."""
    folder = shutil.copytree(random_reranker, tmp_path / "fp8")
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim == 2:
            weights[name] = weight.to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    check_against_oracle(folder, random_reranker)


def check_against_oracle(folder: Path, original: Path) -> None:
    """The scores are the oracle's, and others than those of the checkpoint from which the folder was made."""
    documents = [DOCUMENTS[name] for name in ("text", "image", "image and text")]
    oracle = RerankOracle(folder)
    expected = [oracle.score(QUERIES["image"], one) for one in documents]
    with Reranker(str(folder), device="cpu") as changed, Reranker(str(original), device="cpu") as reranker:
        np.testing.assert_allclose(changed.score(QUERIES["image"], documents), expected, rtol=0, atol=MAX_DIFFERENCE)
        others = reranker.score(QUERIES["image"], documents)
    assert min(abs(one - other) for one, other in zip(others, expected, strict=True)) > 10 * MAX_DIFFERENCE


def test_query_with_a_picture_is_encoded_once(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reranker.models.reranker
    assert model is not None
    encoded: list[int] = []
    encode = Vision.__call__

    def count(self: Vision, batch: PackedPatches) -> Any:
        encoded.append(len(batch.coordinates))
        return encode(self, batch)

    monkeypatch.setattr(Vision, "__call__", count)
    query = {"image": picture(160, 96, 77)}
    scores = reranker.score(query, [words(5 + seed, seed) for seed in range(100)])
    assert encoded == [10 * 6]  # patches of 16x16 pixels
    assert len(set(scores)) == 100


def test_shared_prefix_gives_the_scores_of_whole_pairs(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    query = {"image": [picture(64, 96, 8), picture(100, 100, 9)], "text": "which one"}
    shared = reranker.score(query, DOCUMENTS.values())
    model = reranker.models.reranker
    assert model is not None
    monkeypatch.setattr(model, "max_shared_tokens", 0)
    np.testing.assert_allclose(reranker.score(query, DOCUMENTS.values()), shared, rtol=0, atol=MAX_BATCH_DIFFERENCE)


def test_two_queries_that_differ_in_their_picture_only_share_nothing(reranker: Reranker) -> None:
    first, second = (reranker.score({"image": picture(64, 64, seed)}, ["red", "green"]) for seed in (30, 31))
    again = reranker.score({"image": picture(64, 64, 30)}, ["red", "green"])
    assert first == pytest.approx(again, abs=1e-7)
    assert min(abs(one - other) for one, other in zip(first, second, strict=True)) > 1e-5


def test_ranking_is_best_first(reranker: Reranker) -> None:
    documents = ["red", "green", words(20), "blue"]
    scores = reranker.score("a color", documents)
    ranking = reranker.rank("a color", documents)
    assert [one.score for one in ranking] == pytest.approx(sorted(scores, reverse=True), abs=MAX_BATCH_DIFFERENCE)
    assert [one.index for one in ranking] == sorted(range(4), key=lambda index: -scores[index])
    assert [one.index for one in reranker.rank("a color", documents, top_n=2)] == [one.index for one in ranking[:2]]
    assert reranker.rank("a color", []) == []


def test_equal_scores_keep_their_order() -> None:
    assert best_first([0.5, 0.7, 0.5, 0.7]) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("query", "documents", "error", "message"),
    [
        ({"image": b"no picture"}, ["red"], InvalidMedia, "^query: "),
        ("red", ["green", {"image": b"no picture"}], InvalidMedia, "^item 1: "),
        ("red", ["green", ""], InvalidRequest, "^item 1: text is empty"),
        ("", ["green"], InvalidRequest, "^query: text is empty"),
        ("red", [{"text": "green", "instruction": "Find it."}], InvalidRequest, "has no instruction"),
        ({"text": "red", "dimensions": 64}, ["green"], InvalidRequest, r"^query: dimensions: got 64 \(a number\); "),
    ],
)
def test_what_cannot_be_scored_is_an_error(
    query: Any, documents: list[Any], error: type[Exception], message: str, reranker: Reranker
) -> None:
    with pytest.raises(error, match=message):
        reranker.score(query, documents)


def test_document_that_fails_has_its_error_in_the_place_of_the_score(reranker: Reranker) -> None:
    missing = InvalidMedia("the page is gone")
    scores = reranker.score("red", ["green", {"image": b"no picture"}, {"text": ""}, missing, "red"], errors="return")
    assert [type(one) for one in scores] == [float, InvalidMedia, InvalidRequest, InvalidMedia, float]
    assert [one.item for one in scores if isinstance(one, EmbedderError)] == [1, 2, 3]
    assert scores[::4] == pytest.approx(reranker.score("red", ["green", "red"]), abs=MAX_BATCH_DIFFERENCE)
    assert reranker.score("red", [missing], errors="return") == [missing]
    with pytest.raises(InvalidMedia, match=r"^item 1: the page is gone"):
        reranker.score("red", ["green", missing])


def test_embedding_model_and_reranker_are_told_apart(
    random_checkpoint: Path, random_reranker: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelUnavailable, match="is a reranker, which has no vectors; set EMBEDDER_RERANKER"):
        Embedder(str(random_reranker), device="cpu")
    named = tmp_path / "Qwen3-VL-Embedding-2B"
    shutil.copytree(random_checkpoint, named)
    with pytest.raises(ModelUnavailable, match="is an embedding model, whose scores would mean nothing"):
        Reranker(str(named), device="cpu")
    with pytest.raises(ModelUnavailable, match="has no tokens 'yes' and 'no'; needed: a reranker's"):
        Reranker(str(random_checkpoint), device="cpu")


def test_pairs_of_a_long_query_are_prepared_a_few_at_a_time(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds a copy of the query's tokens: 2,048 short documents of a query of 8,000 tokens took 0.5 GB."""
    workers = reranker.engine._workers
    ready, add = [], workers.add_ready_bytes
    monkeypatch.setattr("embedder.engine.preprocess_workers.READY_BYTES", 2**16)
    monkeypatch.setattr(workers, "add_ready_bytes", lambda size: (add(size), ready.append(workers._ready_bytes)))
    scores = reranker.rank(words(150), ["red"] * 60)
    assert len(scores) == len(ready) == 60
    assert 2**16 < max(ready) < 2**17
