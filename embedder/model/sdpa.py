"""Attention by torch's scaled_dot_product_attention, on any device; `attention` says what its arguments are."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from embedder.model.packing import Run, Sequences

# With more keys than queries, sdpa takes a mask, or queries of zeros before the first one. A mask is faster for few
# queries: 100 times for 12 queries and 6,126 keys, twice for 300 and 1,000, as fast for 600 and 1,000, 0.6 times for
# 1,480 and 1,500. The kernel then skips blocks of keys that no query attends to (x86 with AVX2, one core, 2026-11-29).
MAX_CACHED_MASK = 2**16  # elements; small sequences also take a mask whatever their lengths are
MAX_MASK = 2**24  # elements


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
) -> Tensor:
    """scaled_dot_product_attention, one call for consecutive sequences of equal length."""
    attended = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.shape[1] > key.shape[1] and query.device.type != "cpu":  # the fused kernels of older GPUs take no groups
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    for query_run, key_run in zip(queries.runs, keys.runs, strict=True):
        sdpa_run(query, key, value, query_run, key_run, attended, causal=causal)
    return attended


def sdpa_run(
    query: Tensor, key: Tensor, value: Tensor, query_run: Run, key_run: Run, attended: Tensor, *, causal: bool
) -> None:
    """The sequences of one run, in one call; writes their part of `attended`, which is shaped like `query`."""
    run_query, mask = query_run.view(query), None
    num_missing = key_run.length - query_run.length if causal else 0  # the keys before the first query's
    if num_missing and _takes_mask(query_run.length, key_run.length):
        mask = causal_mask(query_run.length, key_run.length, query.dtype, query.device)
    elif num_missing:
        run_query = F.pad(run_query, (0, 0, 0, 0, num_missing, 0))
    values = F.scaled_dot_product_attention(
        run_query.transpose(1, 2),  # (count, num_heads, length, head_dim)
        key_run.view(key).transpose(1, 2),
        key_run.view(value).transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=query.shape[1] > key.shape[1],
    )
    query_run.view(attended).copy_(values.transpose(1, 2)[:, -query_run.length :])


def _takes_mask(num_queries: int, num_keys: int) -> bool:
    size = num_queries * num_keys
    return size <= MAX_CACHED_MASK or (2 * num_queries <= num_keys and size <= MAX_MASK)


def causal_mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(num_queries, num_keys), 0 where a query attends to a key, else minus infinity; aligned at the ends.

    Of a mask of booleans, sdpa would make this one in each layer.
    """
    make = _cached_mask if num_queries * num_keys <= MAX_CACHED_MASK else _make_mask
    return make(num_queries, num_keys, dtype, device)


def _make_mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask = torch.full((num_queries, num_keys), -torch.inf, dtype=dtype, device=device)
    return mask.triu_(num_keys - num_queries + 1)


_cached_mask = lru_cache(maxsize=256)(_make_mask)  # every layer needs the same one
