"""Attention by oneDNN's matrix products, for sequences of more than a few hundred tokens, in float32 on a CPU.

The kernel of `sdpa` multiplies with MKL, which on some AMD processors has less than half of oneDNN's rate. This is two
products and a softmax for each key head and each block of queries. Its scores go through memory, and still it takes
little more than half of the time there. On many cores, or where MKL is fast, it may take longer: `is_faster_than_sdpa`
measures. `python -m benchmarks.choices` compares forward passes with both.
"""

from __future__ import annotations

import logging
import math
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from embedder.model.onednn import onednn_matmul
from embedder.model.packing import Run, Sequences
from embedder.model.sdpa import sdpa_attention, sdpa_run
from embedder.model.time_ratio import MAX_TIME_RATIO, time_ratio

logger = logging.getLogger(__name__)

# Shorter sequences are left to sdpa, which computes all heads in one call.
MIN_CAUSAL_QUERIES = 160
MIN_QUERIES = 320
CAUSAL_BLOCK = 128  # queries; the keys after a block are not computed for it
BLOCK_ROWS = 1024  # queries of a block times heads of a group, if all keys are attended
MAX_SCORES = 2**21  # of a block, 8 MB
# oneDNN generates code for each shape, 0.6 MB. Therefore queries are padded to a multiple of CAUSAL_STEP or STEP (few
# images have the same size, but texts all sizes), and up to `end` keys to a multiple of `step`.
CAUSAL_STEP, STEP = 64, 32
_KEY_STEPS = ((1024, 32), (2048, 64), (4096, 128))
_LAST_KEY_STEP = 256

MEASURED_QUERIES, MEASURED_HEADS, MEASURED_KEY_HEADS, MEASURED_HEAD_DIM = 512, 16, 8, 128  # as in the 2B
MEASURE_S = 0.06


def onednn_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
) -> Tensor:
    """Long sequences one by one; short ones as `sdpa_attention` does."""
    attended = torch.empty(query.shape, dtype=query.dtype)
    for query_run, key_run in zip(queries.runs, keys.runs, strict=True):
        if query_run.length < (MIN_CAUSAL_QUERIES if causal else MIN_QUERIES):
            sdpa_run(query, key, value, query_run, key_run, attended, causal=causal)
            continue
        parts = [run.view(one) for one, run in ((query, query_run), (key, key_run), (value, key_run))]
        for one_query, one_key, one_value, output in zip(*parts, query_run.view(attended), strict=True):
            _attend(one_query, one_key, one_value, output, causal=causal)
    return attended


def _attend(query: Tensor, key: Tensor, value: Tensor, output: Tensor, *, causal: bool) -> None:
    """One sequence: (num_queries, num_heads, head_dim), and (num_keys, num_kv_heads, head_dim) twice, to `output`."""
    num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[:2]
    group = num_heads // num_kv_heads
    key, value = _by_head(key), _by_head(value)
    padded_keys = key.shape[1]
    step = CAUSAL_STEP if causal else STEP
    block = min(CAUSAL_BLOCK if causal else BLOCK_ROWS // group, MAX_SCORES // (group * padded_keys))
    block = min(max(step, block // step * step), _pad(num_queries, step))
    for start, end in pairwise([0, *range(num_queries % block or block, num_queries + 1, block)]):  # a short one first
        rows = end - start
        padded_rows = _pad(rows, step)
        before = start + num_keys - num_queries  # keys that all queries of the block attend to
        seen = min(_pad_keys(before + rows), padded_keys) if causal else padded_keys
        grouped = query.new_zeros(num_kv_heads, group, padded_rows, head_dim)
        grouped[:, :, :rows] = query[start:end].view(rows, num_kv_heads, group, -1).permute(1, 2, 0, 3)
        grouped *= 1 / math.sqrt(head_dim)
        mixed = torch.empty_like(grouped)
        for head in range(num_kv_heads):
            scores = onednn_matmul(grouped[head].flatten(0, 1), key[head, :seen])
            if causal:
                scores.view(group, padded_rows, seen)[:, :, before:] += _after(padded_rows, seen - before)
            else:
                scores[:, num_keys:] = -math.inf
            mixed[head] = onednn_matmul(scores.softmax(-1), value[head, :seen].t()).view(group, padded_rows, head_dim)
        output[start:end] = mixed[:, :, :rows].permute(2, 0, 1, 3).flatten(1, 2)


def _by_head(states: Tensor) -> Tensor:
    """(num_keys, num_kv_heads, head_dim) to (num_kv_heads, padded_keys, head_dim)."""
    padded = states.new_zeros(states.shape[1], _pad_keys(len(states)), states.shape[2])
    padded[:, : len(states)] = states.transpose(0, 1)
    return padded


def _pad(count: int, step: int) -> int:
    return math.ceil(count / step) * step


def _pad_keys(count: int) -> int:
    return _pad(count, next((step for end, step in _KEY_STEPS if count <= end), _LAST_KEY_STEP))


@lru_cache(maxsize=64)  # a block has few shapes
def _after(num_queries: int, num_keys: int) -> Tensor:
    """What is added to scores: minus infinity for keys after a query's own, which the first query has first."""
    return torch.full((num_queries, num_keys), -math.inf).triu(1)


@cache
def is_faster_than_sdpa() -> bool:
    """Whether this is faster than `sdpa_attention` here, by a short measurement. One for all models of a process."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    query = torch.ones(MEASURED_QUERIES, MEASURED_HEADS, MEASURED_HEAD_DIM)
    key = query[:, :MEASURED_KEY_HEADS].contiguous()
    where = Sequences(torch.empty(0), MEASURED_QUERIES, (Run(0, 1, MEASURED_QUERIES),))
    with torch.inference_mode():
        ratio = time_ratio(
            lambda: onednn_attention(query, key, key, where, where, causal=True),
            lambda: sdpa_attention(query, key, key, where, where, causal=True),
            MEASURE_S,
        )
    logger.info("attention: oneDNN's products take %.0f%% of the time of torch's kernel", 100 * ratio)
    return ratio <= MAX_TIME_RATIO
