"""Vision features that come again: computed once, equal to computed ones, within a limit of bytes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedder import Embedder, Reranker
from embedder.inputs.python_items import item_from_python
from embedder.model.packing import PackedPatches, PackedVision
from embedder.model.vision import Vision
from embedder.model.vision_cache import VisionCache
from embedder.models import Models
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from tests.conftest import encoded, picture

PAGES = [{"image": picture(96, 160, 200 + seed)} for seed in range(4)]
CLIP = {"video": [picture(64, 64, seed) for seed in range(4)], "text": "what moves"}
MIXED = {"content": [{"type": "text", "text": "a "}, {"type": "image", "image": picture(60, 90, 210)}]}
DOCUMENTS: list[Any] = [*PAGES, CLIP, MIXED, "a text"]


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of patches of each call of a vision tower."""
    counted: list[int] = []
    encode = Vision.__call__

    def count(self: Vision, batch: PackedPatches) -> Any:
        counted.append(len(batch.coordinates))
        return encode(self, batch)

    monkeypatch.setattr(Vision, "__call__", count)
    return counted


@pytest.fixture(scope="module")
def cached(random_reranker: Path) -> Iterator[Reranker]:
    with Reranker(str(random_reranker), device="cpu") as reranker:
        yield reranker


@pytest.fixture(scope="module")
def uncached(random_reranker: Path) -> Iterator[Reranker]:
    with Reranker(str(random_reranker), device="cpu", vision_cache_bytes=0) as reranker:
        yield reranker


def cache_of(reranker: Reranker) -> VisionCache:
    assert reranker.models.reranker is not None
    return reranker.models.reranker.forward.vision_cache


def test_page_under_another_query_is_not_encoded_again(
    cached: Reranker, uncached: Reranker, encodes: list[int]
) -> None:
    queries: list[Any] = ["a green car", "a bee", PAGES[0], {"image": picture(64, 64, 220), "text": "like this"}]
    scores = [cached.score(query, DOCUMENTS) for query in queries]
    assert sum(encodes) == 4 * 60 + 2 * 16 + 4 * 6 + 16  # each picture of all requests once: patches of 16 x 16 pixels
    encodes.clear()
    again = [cached.score(query, DOCUMENTS) for query in queries]
    np.testing.assert_allclose(again, scores, rtol=0, atol=1e-6)
    assert encodes == []
    np.testing.assert_allclose(scores, [uncached.score(query, DOCUMENTS) for query in queries], rtol=0, atol=1e-6)
    assert len(encodes) > len(queries)  # without a cache, those of each request
    assert len({round(score, 4) for of_query in scores for score in of_query}) > 20


def test_other_bytes_of_the_same_pixels_are_the_same_page(cached: Reranker, encodes: list[int]) -> None:
    page = picture(80, 80, 230)
    first = cached.score("red", [{"image": page}, {"image": encoded(page)}])
    assert len(encodes) == 1
    again = cached.score("green", [{"image": encoded(page, "WEBP", lossless=True)}, "a text"])
    assert len(encodes) == 1
    assert first[0] == pytest.approx(first[1], abs=1e-6)
    assert again[0] != pytest.approx(first[0], abs=1e-5)


def test_pages_of_one_size_are_not_mixed_up(cached: Reranker, uncached: Reranker) -> None:
    """Also when some of a batch are kept and others new."""
    cached.score("red", PAGES[1:3])
    order = [PAGES[2], {"image": picture(96, 160, 240)}, PAGES[1], {"image": picture(96, 160, 241)}, PAGES[2]]
    scores = cached.score("green", order)
    np.testing.assert_allclose(scores, uncached.score("green", order), rtol=0, atol=1e-6)
    assert min(abs(scores[0] - scores[place]) for place in (1, 2, 3)) > 1e-5


def batch_of(*keys: bytes, reused: tuple[Tensor | int, ...] = ()) -> PackedVision:
    """Two visual tokens for each key. The pixels are not looked at."""
    empty = torch.empty(0)
    patches = PackedPatches(empty, empty, empty, empty, None)  # type: ignore[arg-type]
    return PackedVision(patches if keys else None, keys, (2,) * len(keys), reused, empty)


def encode_as(*values: float) -> Callable[[PackedPatches], tuple[Tensor, list[Tensor]]]:
    """A tower whose features of each image are its value, and ten times as much in the DeepStack layer."""
    tokens = torch.tensor(values, dtype=torch.float32).repeat_interleave(2)[:, None].repeat(1, 4)
    return lambda _: (tokens, [10 * tokens])


ENTRY_BYTES = 2 * 2 * 4 * 4  # layers, tokens, hidden size, bytes of a float32


def test_least_recently_used_features_are_dropped_at_the_limit() -> None:
    uses: list[tuple[int, int]] = []
    cache = VisionCache(2 * ENTRY_BYTES + 1, lambda *use: uses.append(use))
    cache.complete(batch_of(b"a", b"b"), encode_as(1, 2))
    assert cache.find(b"a") is not None
    cache.complete(batch_of(b"c"), encode_as(3))
    assert (len(cache), cache.num_bytes) == (2, 2 * ENTRY_BYTES)
    assert cache.find(b"b") is None
    cache.complete(batch_of(b"a"), encode_as(1))  # another batch of the same time encoded it, too
    assert cache.num_bytes == 2 * ENTRY_BYTES
    assert uses == [(0, 2), (0, 1), (0, 1)]


def test_reused_features_come_after_the_new_ones_in_the_order_of_the_batch() -> None:
    cache = VisionCache(10**6)
    cache.complete(batch_of(b"a"), encode_as(1))
    kept = cache.find(b"a")
    assert kept is not None
    tokens, (deepstack,) = cache.complete(batch_of(b"b", b"c", reused=(kept, 1, 0)), encode_as(2, 3))
    assert tokens[:, 0].tolist() == [2, 2, 3, 3, 1, 1, 3, 3, 2, 2]
    assert torch.equal(deepstack, 10 * tokens)
    tokens, (deepstack,) = cache.complete(batch_of(reused=(kept,)), encode_as())
    assert (tokens[:, 0].tolist(), deepstack[:, 0].tolist()) == ([1, 1], [10, 10])


def test_features_larger_than_the_cache_are_computed_and_not_kept() -> None:
    cache = VisionCache(ENTRY_BYTES - 1)
    tokens, _ = cache.complete(batch_of(b"a"), encode_as(1))
    assert (tokens[0, 0], len(cache), cache.num_bytes) == (1, 0, 0)


def test_limit_of_bytes_applies_to_real_pages_and_uses_are_counted(random_reranker: Path) -> None:
    metrics = Metrics(())
    with Reranker(str(random_reranker), device="cpu", vision_cache_bytes=40_000, observer=metrics) as reranker:
        for page in (*PAGES, PAGES[-1]):
            reranker.score("red", [page])
        cache = cache_of(reranker)
        assert 0 < cache.num_bytes <= 40_000
        assert 0 < len(cache) < len(PAGES)
        lines = metrics.exposition().decode().splitlines()
        assert [line for line in lines if line.startswith("embedder_vision_cache_total")] == [
            'embedder_vision_cache_total{result="hit"} 1.0',
            'embedder_vision_cache_total{result="miss"} 4.0',
        ]
        assert reranker.info()["vision_cache"] == {"max_bytes": 40_000, "is_shared_with_embedder": False}


def with_vision_of(other: Path, folder: Path, target: Path) -> Path:
    """A copy of the checkpoint `folder` with the vision weights of `other`."""
    shutil.copytree(folder, target)
    weights, others = (load_file(one / "model.safetensors") for one in (folder, other))
    weights |= {name: weight for name, weight in others.items() if "visual." in name}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("is_same", [True, False])
def test_embedder_shares_the_cache_only_with_the_same_vision_weights(
    is_same: bool,
    random_checkpoint: Path,
    random_reranker: Path,
    embedder: Embedder,
    tmp_path: Path,
    encodes: list[int],
) -> None:
    folder = with_vision_of(random_reranker, random_checkpoint, tmp_path / "copy") if is_same else random_checkpoint
    models = Models(Settings(model=str(folder), reranker=str(random_reranker), device="cpu"))
    try:
        assert models.info()["reranker"]["vision_cache"]["is_shared_with_embedder"] is is_same
        asyncio.run(models.warm_up())  # embeds a picture, and scores it
        assert len(encodes) == (1 if is_same else 2)
        item = item_from_python(PAGES[0], None, None)
        first, again = (models.engine.submit(item).result().vector for _ in range(2))
        assert len(encodes) == (2 if is_same else 4)
    finally:
        models.close()
    np.testing.assert_allclose(first, again, rtol=0, atol=1e-6)
    if not is_same:
        np.testing.assert_allclose(first, embedder.embed(PAGES[:1])[0], rtol=0, atol=1e-6)


def test_embedder_by_itself_has_no_vision_cache(embedder: Embedder, encodes: list[int]) -> None:
    embedder.embed(PAGES[:1])
    embedder.embed(PAGES[:1])
    assert len(encodes) == 2
    assert "vision_cache" not in embedder.info()
