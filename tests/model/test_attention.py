"""Attention: the back end on this machine against a plain softmax, and which one a device gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedder.errors import ModelUnavailable
from embedder.model import attention, onednn_attention, sdpa
from embedder.model.attention import Attention, choose_attention, flash_attn_import_error
from embedder.model.packing import Run, Sequences
from embedder.model.sdpa import sdpa_attention

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequences(lengths: list[int], paired_with: list[int] | None = None) -> Sequences:
    """As `packing` makes them, written without it: runs of equal length, cut as those of `paired_with`."""
    ends = np.cumsum(lengths).tolist()
    keys = paired_with or lengths
    runs: list[Run] = []
    for index, (start, length) in enumerate(zip([0, *ends[:-1]], lengths, strict=True)):
        if index and keys[index] == keys[index - 1]:
            runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
        else:
            runs.append(Run(start, 1, length))
    return Sequences(torch.tensor([0, *ends], dtype=torch.int32), max(lengths), tuple(runs))


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, query_lengths: list[int], key_lengths: list[int], causal: bool
) -> Tensor:
    """One softmax for each sequence, head and query token, in float64; the last query attends all keys."""
    query, key, value = query.double(), key.double(), value.double()
    num_heads, head_dim = query.shape[1:]
    repeats = num_heads // key.shape[1]
    attended = torch.empty_like(query)
    query_start = key_start = 0
    for query_length, key_length in zip(query_lengths, key_lengths, strict=True):
        for head in range(num_heads):
            for place in range(query_length):
                stop = key_start + key_length - (query_length - place - 1 if causal else 0)
                keys, values = (one[key_start:stop, head // repeats] for one in (key, value))
                weights = torch.softmax(keys @ query[query_start + place, head] / math.sqrt(head_dim), dim=0)
                attended[query_start + place, head] = weights @ values
        query_start += query_length
        key_start += key_length
    return attended


LENGTHS = [5, 5, 1, 9, 9, 9, 5, 2]


@pytest.fixture(params=["sdpa", "onednn"])
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """Of a CPU; oneDNN's takes sequences of any length."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    for name in ("MIN_CAUSAL_QUERIES", "MIN_QUERIES"):
        monkeypatch.setattr(onednn_attention, name, 1)
    return choose_attention(request.param, CPU, torch.float32)[1]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_attention_is_a_softmax_per_sequence(
    num_heads: int, num_kv_heads: int, causal: bool, back_end: Attention
) -> None:
    total = sum(LENGTHS)
    query, key, value = randn(total, num_heads, 8), randn(total, num_kv_heads, 8, seed=1), randn(total, num_kv_heads, 8)
    where = sequences(LENGTHS)
    attended = back_end(query, key, value, where, where, causal=causal)
    expected = naive_attention(query, key, value, LENGTHS, LENGTHS, causal)
    assert (attended - expected).abs().max() < 1e-5


@pytest.mark.parametrize("max_scores", [onednn_attention.MAX_SCORES, 2**14])
@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_are_computed_in_blocks(
    causal: bool, max_scores: int, back_end: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_attention, "MAX_SCORES", max_scores)
    monkeypatch.setattr(onednn_attention, "BLOCK_ROWS", 192)
    own, keys = [300, 128, 128, 65, 1], [300, 140, 140, 300, 64] if causal else [300, 128, 128, 65, 1]
    query, key, value = randn(sum(own), 6, 8), randn(sum(keys), 2, 8, seed=1), randn(sum(keys), 2, 8, seed=2)
    where = sequences(own, paired_with=keys), sequences(keys, paired_with=own)
    attended = back_end(query, key, value, *where, causal=causal)
    assert (attended - naive_attention(query, key, value, own, keys, causal)).abs().max() < 1e-5


def test_pooled_token_attends_its_whole_sequence() -> None:
    query, key, value = randn(len(LENGTHS), 6, 8), randn(sum(LENGTHS), 2, 8, seed=1), randn(sum(LENGTHS), 2, 8, seed=2)
    ones = [1] * len(LENGTHS)
    attended = sdpa_attention(query, key, value, sequences(ones, paired_with=LENGTHS), sequences(LENGTHS), causal=False)
    assert (attended - naive_attention(query, key, value, ones, LENGTHS, causal=False)).abs().max() < 1e-5


def test_pooled_last_token_is_the_last_row_of_causal_attention() -> None:
    query, key, value = randn(sum(LENGTHS), 4, 8), randn(sum(LENGTHS), 2, 8, seed=1), randn(sum(LENGTHS), 2, 8, seed=2)
    where = sequences(LENGTHS)
    last = (torch.tensor(LENGTHS).cumsum(0) - 1).tolist()
    whole = sdpa_attention(query, key, value, where, where, causal=True)[last]
    pooled = sequences([1] * len(LENGTHS), paired_with=LENGTHS)
    alone = sdpa_attention(query[last], key, value, pooled, where, causal=False)
    assert (whole - alone).abs().max() < 1e-5


@pytest.mark.parametrize("is_faster", [True, False])
def test_cpu_takes_the_faster_back_end_in_float32(is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_faster_than_sdpa", lambda: is_faster)
    assert choose_attention("auto", CPU, torch.float32)[0] == ("onednn" if is_faster else "sdpa")
    assert choose_attention("auto", CPU, torch.bfloat16) == ("sdpa", sdpa_attention)
    assert choose_attention("sdpa", CPU, torch.float32) == ("sdpa", sdpa_attention)


@pytest.mark.parametrize("ratio", [0.5, 0.99])
def test_back_ends_are_compared_on_the_same_sequence(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], _: float) -> float:
        assert torch.allclose(ours(), theirs(), rtol=0, atol=1e-5)
        return ratio

    monkeypatch.setattr(onednn_attention, "time_ratio", compare)
    assert onednn_attention.is_faster_than_sdpa.__wrapped__() == (ratio < 0.95)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_onednn_attention_is_for_float32_on_a_cpu(device: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelUnavailable, match=f"^attention back end onednn .* this is {device} in {dtype}. Use sdpa$"):
        choose_attention("onednn", torch.device(device), dtype)


@pytest.mark.parametrize("name", ["varlen", "flash_attn"])
def test_cuda_back_ends_are_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"^attention back end {name} needs CUDA; the device is cpu. Use sdpa$"):
        choose_attention(name, CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "reason"),
    [
        ("varlen", torch.float32, (9, 0), "varlen needs a dtype of 16 bits, not float32. Use sdpa"),
        ("varlen", torch.float16, (7, 5), r"has compute capability \(7, 5\); allowed: \(8, 0\) or newer. Use sdpa"),
        ("flash_attn", torch.bfloat16, (9, 0), r"flash-attn cannot be used \(ModuleNotFoundError.*\); use varlen"),
    ],
)
def test_what_a_gpu_cannot_serve_is_refused(
    name: str, dtype: torch.dtype, capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ModelUnavailable, match=reason):
        choose_attention(name, torch.device("cuda"), dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, (8, 0), "varlen"),
        ("cuda", torch.float16, (9, 0), "varlen"),
        ("cuda", torch.float32, (9, 0), "sdpa"),
        ("cuda", torch.float16, (7, 5), "sdpa"),
        ("xpu", torch.bfloat16, (), "sdpa"),
        ("mps", torch.bfloat16, (), "sdpa"),
    ],
)
def test_accelerator_takes_a_packed_kernel_if_it_has_one(
    device: str, dtype: torch.dtype, capability: tuple[int, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_attention("auto", torch.device(device), dtype)[0] == expected


def test_amd_gpu_has_no_packed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI300 has the capability (9, 4)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_attention("auto", torch.device("cuda"), torch.bfloat16)[0] == "sdpa"
    for name in ("varlen", "flash_attn"):
        with pytest.raises(ModelUnavailable, match=f"attention back end {name} needs an NVIDIA GPU; .* Use sdpa"):
            choose_attention(name, torch.device("cuda"), torch.bfloat16)


def test_slower_attention_of_an_accelerator_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    for name, device in (("sdpa", "cpu"), ("varlen", "cuda")):
        attention.log_attention(name, torch.device(device))
    assert not caplog.records
    attention.log_attention("sdpa", torch.device("mps"))
    assert "sdpa, with one call for each length in a batch and without CUDA graphs" in caplog.text


def test_package_called_flash_attn_that_lacks_the_function_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As flash-attn 4 installs itself: a folder `flash_attn/cute`, and no `flash_attn/__init__.py`."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    flash_attn_import_error.cache_clear()
    assert choose_attention("auto", torch.device("cuda"), torch.bfloat16)[0] == "varlen"
    assert "flash_attn_varlen_func" in (flash_attn_import_error() or "")
    flash_attn_import_error.cache_clear()


@pytest.mark.parametrize("max_cached_mask", [0, sdpa.MAX_CACHED_MASK])
@pytest.mark.parametrize("max_mask", [0, sdpa.MAX_MASK])
def test_causal_attention_with_more_keys_is_the_same_with_and_without_a_mask(
    max_cached_mask: int, max_mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "MAX_CACHED_MASK", max_cached_mask)
    monkeypatch.setattr(sdpa, "MAX_MASK", max_mask)
    own, keys = [3, 3, 1, 40, 6, 10], [7, 7, 1, 60, 6, 50]
    query = randn(sum(own), 6, 8)
    key, value = randn(sum(keys), 2, 8, seed=1), randn(sum(keys), 2, 8, seed=2)
    where = sequences(own, paired_with=keys), sequences(keys, paired_with=own)
    attended = sdpa_attention(query, key, value, *where, causal=True)
    assert (attended - naive_attention(query, key, value, own, keys, causal=True)).abs().max() < 1e-5


@pytest.mark.parametrize(("own", "keys", "computed"), [(300, 320, 320), (300, 700, 300), (20, 4000, 20)])
def test_a_short_document_after_a_long_query_computes_only_its_own_tokens(
    own: int, keys: int, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a mask of many lengths kept: each would have one of its own, of up to 64 MB."""
    lengths, original = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return original(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    kept = sdpa._cached_mask.cache_info()
    query, key = randn(own, 2, 8), randn(keys, 2, 8, seed=1)
    where = sequences([own], paired_with=[keys]), sequences([keys], paired_with=[own])
    attended = sdpa_attention(query, key, key, *where, causal=True)
    assert lengths == [computed]
    assert sdpa._cached_mask.cache_info() == kept
    assert (attended - naive_attention(query, key, key, [own], [keys], causal=True)).abs().max() < 1e-5


def test_keys_of_a_prefix_come_before_those_of_the_queries(back_end: Attention) -> None:
    own, prefix = [3, 3, 1, 6], [4, 4, 4, 0]
    keys = [one + more for one, more in zip(own, prefix, strict=True)]
    query = randn(sum(own), 6, 8)
    key, value = randn(sum(keys), 2, 8, seed=1), randn(sum(keys), 2, 8, seed=2)
    attended = back_end(query, key, value, sequences(own), sequences(keys, paired_with=own), causal=True)
    query_start = key_start = 0
    for num_queries, num_keys in zip(own, keys, strict=True):
        for place in range(num_queries):  # the last query sees all keys, the one before all but the last
            alone = query[query_start + place][None]
            stop = key_start + num_keys - num_queries + place + 1
            seen = slice(key_start, stop)
            expected = naive_attention(alone, key[seen], value[seen], [1], [stop - key_start], causal=False)
            assert (attended[query_start + place] - expected[0]).abs().max() < 1e-5
        query_start, key_start = query_start + num_queries, key_start + num_keys
