"""Packed queries, keys, values -> attended values: one function, three back ends.

Every back end takes query (query_tokens, num_heads, head_dim), key and value (tokens, num_kv_heads, head_dim), and
gives (query_tokens, num_heads, head_dim). `queries` and `keys` say where sequences stand; sequence i of one attends
sequence i of the other. With `causal`, the last query of a sequence attends all of its keys, the one before all but the
last, and so on: keys may be more than queries.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from embedder.errors import ModelUnavailable
from embedder.model.packing import Sequences

LEAST_CAPABILITY = (8, 0)  # Ampere, of flash attention in bfloat16
MAX_KEPT_MASK = 2**16  # bytes of a mask that is kept; making a larger one is little beside the attention itself


class Attention(Protocol):
    """Signature of a back end."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
    ) -> Tensor: ...


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Attention]:
    """The back end called `name` for `device`, and its name; `auto` takes the fastest there is.

    Raises `ModelUnavailable` where it cannot serve that device or dtype.
    """
    has_flash = flash_attention_fault() is None
    if name == "auto":
        name = ("flash_attn" if has_flash else "varlen") if device.type == "cuda" else "sdpa"
    if name != "sdpa" and device.type != "cuda":
        raise ModelUnavailable(f"attention back end {name} needs CUDA; on {device.type} use sdpa")
    if name == "sdpa" and device.type != "cpu":
        raise ModelUnavailable("attention back end sdpa serves the CPU; on CUDA use varlen or flash_attn")
    if name == "flash_attn" and not has_flash:
        raise ModelUnavailable(
            f"EMBEDDER_ATTENTION=flash_attn, but flash-attn cannot be used: {flash_attention_fault()}; use varlen"
        )
    if device.type == "cuda":
        _check_gpu(device, dtype)
    return name, {"flash_attn": flash_attention, "varlen": varlen_attention, "sdpa": sdpa_attention}[name]


@cache
def flash_attention_fault() -> str | None:
    """Why `flash_attn_varlen_func` cannot be imported; None where it can.

    The function itself is tried: flash-attn 4 installs a package of that name without it, and a wheel that was built
    for another torch fails only when it is loaded.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check_gpu(device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        raise ModelUnavailable("attention on a GPU computes in 16 bits; EMBEDDER_DTYPE=float32 is for the CPU")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise ModelUnavailable(f"{device} has compute capability {capability}; allowed: {LEAST_CAPABILITY} or newer")


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
) -> Tensor:
    """scaled_dot_product_attention, neighbors of equal length in one call."""
    attended = torch.empty_like(query)
    is_grouped = query.shape[1] > key.shape[1]
    for query_run, key_run in zip(queries.runs, keys.runs, strict=True):
        is_square = query_run.length == key_run.length
        values = F.scaled_dot_product_attention(
            query_run.of(query).transpose(1, 2),  # (count, num_heads, length, head_dim)
            key_run.of(key).transpose(1, 2),
            key_run.of(value).transpose(1, 2),
            attn_mask=None if is_square or not causal else lower_right(query_run.length, key_run.length),
            is_causal=causal and is_square,
            enable_gqa=is_grouped,
        )
        query_run.of(attended).copy_(values.transpose(1, 2))
    return attended


def lower_right(num_queries: int, num_keys: int) -> Tensor:
    """Which key each query may attend, (num_queries, num_keys), where both end together."""
    is_small = num_queries * num_keys <= MAX_KEPT_MASK
    return _kept_mask(num_queries, num_keys) if is_small else _mask(num_queries, num_keys)


def _mask(num_queries: int, num_keys: int) -> Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


_kept_mask = lru_cache(maxsize=1024)(_mask)  # every layer asks again


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
) -> Tensor:
    """The packed kernel that comes with torch (CUDA), from torch 2.11 on.

    Called as an operator: `torch.nn.attention.varlen.varlen_attn` is a wrapper that fills a tensor of random states in
    each layer, and whose keywords differ between torch 2.11 and 2.13.
    """
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.max_seqlen,
        keys.max_seqlen,
        0.0,  # dropout
        causal,
        return_debug_mask=False,
        window_size_left=-1,
        window_size_right=0 if causal else -1,
        **one_split(),
    )[0]
    return attended


@cache
def one_split() -> dict[str, int]:
    """One split of the keys, so that a vector does not depend on its neighbors in the batch.

    torch 2.11's operator has no such argument. There the kernel may split the keys of the last layer, where each
    sequence has one query; the rounding of a vector then depends on the size of its batch.
    """
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    return {"num_splits": 1} if any(one.name == "num_splits" for one in arguments) else {}


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
) -> Tensor:
    """The flash-attn package (CUDA)."""
    from flash_attn import flash_attn_varlen_func

    attended: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.max_seqlen,
        keys.max_seqlen,
        causal=causal,
    )
    return attended
