"""Rows by content: what counts as the same content, and which rows are kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from embedder.engine.cache import ENTRY_BYTES, VectorCache, content_key
from embedder.inputs.preprocess import ModelInput, Patches
from tests.fake_model import HIDDEN_SIZE

ROW = np.arange(HIDDEN_SIZE, dtype=np.float32)
ROW_BYTES = ROW.nbytes + ENTRY_BYTES


def model_input() -> ModelInput:
    ids, positions = np.arange(6), np.tile(np.arange(6), (3, 1))
    patches = (Patches(np.arange(64, dtype=np.uint8).reshape(4, 16), (1, 2, 2), 1),)
    return ModelInput(ids, positions, np.array([2]), patches, 1, 0, 7)


def test_rows_are_kept_within_the_limit_and_the_least_recently_used_is_dropped() -> None:
    cache = VectorCache(3 * ROW_BYTES)
    for key in "abc":
        cache.put(key, ROW)
    assert cache.get("a") is not None
    cache.put("d", ROW)
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert (len(cache), cache.num_bytes) == (3, 3 * ROW_BYTES)
    for number in range(100):
        cache.put(number, ROW)
        assert cache.num_bytes <= cache.max_bytes


@pytest.mark.parametrize("max_bytes", [0, ROW_BYTES - 1])
def test_row_over_the_limit_is_not_kept(max_bytes: int) -> None:
    cache = VectorCache(max_bytes)
    cache.put("a", ROW)
    assert (cache.get("a"), cache.num_bytes) == (None, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_row_with_a_value_that_is_not_finite_is_not_kept(value: float) -> None:
    cache = VectorCache(ROW_BYTES)
    cache.put("a", np.where(ROW == 3, np.float32(value), ROW))
    assert len(cache) == 0


def test_kept_row_is_a_read_only_copy() -> None:
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
        same._replace(input_ids=ids[::-1]),
        same._replace(position_ids=positions + 1),
        same._replace(visual_index=index + 1),
        same._replace(patches=()),
        same._replace(patches=(patches, patches)),
        same._replace(patches=(dataclasses.replace(patches, pixels=pixels),)),
        same._replace(patches=(dataclasses.replace(patches, pixels=patches.pixels.reshape(2, 32)),)),
        same._replace(patches=(dataclasses.replace(patches, grid_thw=(1, 1, 4)),)),
        same._replace(patches=(dataclasses.replace(patches, num_frames=2),)),
    ]
    keys = [content_key(one) for one in (same, *others)]
    assert len(set(keys)) == len(keys)
    assert content_key(model_input()._replace(num_cut_tokens=3, cost=9)) == keys[0]
