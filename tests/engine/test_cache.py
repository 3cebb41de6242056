"""Rows by content: what counts as the same, what is kept, and who is answered by whose computation."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import wait

import numpy as np
import pytest

from embedder.engine.cache import ENTRY_BYTES, VectorCache, content_key
from embedder.engine.engine import Engine
from embedder.errors import EngineFailed
from embedder.inputs.preprocess import ModelInput, Patches
from tests.fake_model import HIDDEN_SIZE, FakeModel, held_back, item, row, running, unit

ROW = np.arange(HIDDEN_SIZE, dtype=np.float32)
ROW_BYTES = ROW.nbytes + ENTRY_BYTES


def model_input() -> ModelInput:
    ids, positions = np.arange(6), np.tile(np.arange(6), (3, 1))
    patches = (Patches(np.arange(64, dtype=np.uint8).reshape(4, 16), (1, 2, 2), 1),)
    return ModelInput(ids, positions, np.array([2]), patches, 1, 0, 7)


def test_rows_are_kept_within_the_bytes_and_the_least_recently_used_goes() -> None:
    cache = VectorCache(3 * ROW_BYTES)
    for key in "abc":
        cache.put(key, ROW)
    assert cache.get("a") is not None
    cache.put("d", ROW)
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert (len(cache), cache.num_bytes) == (3, 3 * ROW_BYTES)
    for key in range(100):
        cache.put(key, ROW)
        assert cache.num_bytes <= cache.max_bytes


@pytest.mark.parametrize("max_bytes", [0, ROW_BYTES - 1])
def test_row_that_does_not_fit_is_not_kept(max_bytes: int) -> None:
    cache = VectorCache(max_bytes)
    cache.put("a", ROW)
    assert (cache.get("a"), cache.num_bytes) == (None, 0)


def test_what_is_kept_is_a_copy_that_nobody_can_change() -> None:
    cache = VectorCache(ROW_BYTES)
    rows = np.stack([ROW, ROW])
    cache.put("a", rows[0])
    rows[0] = 0
    kept = cache.get("a")
    assert kept is not None
    np.testing.assert_array_equal(kept, ROW)
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 1


def test_key_depends_on_everything_that_the_vector_depends_on_and_on_nothing_else() -> None:
    same = model_input()
    ids, positions, index, (patches,) = same.input_ids, same.position_ids, same.visual_index, same.patches
    pixels = patches.pixels.copy()
    pixels[-1, -1] += 1
    others = [
        dataclasses.replace(same, input_ids=ids[::-1]),
        dataclasses.replace(same, position_ids=positions + 1),
        dataclasses.replace(same, visual_index=index + 1),
        dataclasses.replace(same, patches=()),
        dataclasses.replace(same, patches=(patches, patches)),
        dataclasses.replace(same, patches=(dataclasses.replace(patches, pixels=pixels),)),
        dataclasses.replace(same, patches=(dataclasses.replace(patches, pixels=patches.pixels.reshape(2, 32)),)),
        dataclasses.replace(same, patches=(dataclasses.replace(patches, grid_thw=(1, 1, 4)),)),
        dataclasses.replace(same, patches=(dataclasses.replace(patches, num_frames=2),)),
    ]
    keys = [content_key(one) for one in (same, *others)]
    assert len(set(keys)) == len(keys)
    assert content_key(dataclasses.replace(model_input(), num_cut_tokens=3, cost=9)) == keys[0]


@pytest.fixture
def engine(model: FakeModel) -> Iterator[Engine]:
    with running(model, cache_bytes=100 * ROW_BYTES) as engine:
        yield engine


def test_same_content_is_computed_once_whatever_is_made_of_its_row(engine: Engine, model: FakeModel) -> None:
    first = engine.submit(item("red")).result(10)
    raw = engine.submit(item("red", normalize=False, instruction="Another that the fake leaves out.")).result(10)
    again = engine.submit(item("red")).result(10)
    np.testing.assert_array_equal(first.vector, again.vector)
    np.testing.assert_array_equal(raw.vector, row("red"))
    assert [first.is_cached, raw.is_cached, again.is_cached] == [False, True, True]
    assert (model.batches, engine.num_cache_hits) == ([1], 2)


def test_equal_items_that_wait_together_share_one_computation(engine: Engine, model: FakeModel) -> None:
    futures = held_back(engine, model, ["red", "green", "red", "red"])
    wait(futures, timeout=10)
    assert model.batches == [1, 2]
    assert sorted(future.result().is_cached for future in futures) == [False, False, True, True]
    for text, future in zip(["red", "green", "red", "red"], futures, strict=True):
        np.testing.assert_array_equal(future.result().vector, unit(text))


def test_cancelled_twin_leaves_the_others_theirs(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    running = engine.submit(item("red"))
    assert model.is_entered.wait(10)
    joined = [engine.submit(item("red")) for _ in range(3)]
    assert running.cancel()  # while the device computes it
    assert joined[0].cancel()
    model.gate.set()
    for future in joined[1:]:
        np.testing.assert_array_equal(future.result(10).vector, unit("red"))
    waiting = held_back(engine, model, ["green"])
    assert waiting[0].result(10).num_tokens == 5
    engine.close()
    assert (len(engine._twins), engine.pending_tokens) == (0, 0)


@pytest.mark.parametrize("text", ["poison", "infinite"])
def test_error_is_not_kept(text: str, engine: Engine, model: FakeModel) -> None:
    for future in held_back(engine, model, [text, text]):
        with pytest.raises(EngineFailed):
            future.result(10)
    num_batches = len(model.batches)
    with pytest.raises(EngineFailed):
        engine.submit(item(text)).result(10)
    assert (len(model.batches), len(engine.cache)) == (num_batches + 1, 1)  # the holder's row alone


def test_crowd_that_asks_the_same_gets_the_same(engine: Engine, model: FakeModel) -> None:
    texts = [f"text {index % 7}" for index in range(200)]
    vectors: dict[int, np.ndarray] = {}

    def ask(start: int) -> None:
        futures = {index: engine.submit(item(texts[index])) for index in range(start, 200, 8)}
        vectors.update({index: future.result(20).vector for index, future in futures.items()})

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(vectors) == 200
    for index, vector in vectors.items():
        np.testing.assert_array_equal(vector, unit(texts[index]))
    assert sum(model.batches) == 7
    assert engine.num_cache_hits == 193
