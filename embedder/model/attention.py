"""Attention over packed sequences, with four back ends of one signature.

Each takes query (num_queries, num_heads, head_dim), key and value (num_keys, num_kv_heads, head_dim), and returns
(num_queries, num_heads, head_dim). `queries` and `keys` say where the sequences are; sequence i of the queries attends
to sequence i of the keys. There may be more keys than queries: with `causal`, the two sequences are aligned at their
ends (the last query attends to all keys, the one before it to all but the last).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from embedder.errors import ModelUnavailable
from embedder.model.devices import VARLEN_CAPABILITY, has_varlen_kernels
from embedder.model.onednn_attention import is_faster_than_sdpa, onednn_attention
from embedder.model.packing import Sequences
from embedder.model.sdpa import sdpa_attention

logger = logging.getLogger(__name__)


class Attention(Protocol):
    """Signature of a back end."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
    ) -> Tensor: ...


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Attention]:
    """The name and the function of the back end for `device`.

    `name` is sdpa (any device), onednn (CPU), varlen (torch's own kernel, CUDA), flash_attn (the package, CUDA) or
    auto: flash_attn if it can be imported, else varlen, on NVIDIA's GPUs from Ampere on in 16 bits; onednn on a CPU in
    float32 if it is faster than sdpa; sdpa elsewhere. Raises `ModelUnavailable` if the back end does not support the
    device or the dtype.
    """
    import_error = flash_attn_import_error()
    if name == "auto":
        name = _best(device, dtype, import_error)
    if name == "onednn":
        _check_cpu(device, dtype)
    elif name != "sdpa":
        _check_gpu(name, device, dtype)
    if name == "flash_attn" and import_error:
        raise ModelUnavailable(f"EMBEDDER_ATTENTION=flash_attn: flash-attn cannot be used ({import_error}); use varlen")
    return name, _BACK_ENDS[name]


def log_attention(name: str, device: torch.device) -> None:
    """Say what was chosen for an accelerator, and what is slower there."""
    if name == "sdpa" and device.type != "cpu":
        logger.warning(
            "attention back end: sdpa, with one call for each length in a batch and without CUDA graphs. It is "
            "slower than varlen, which needs an NVIDIA GPU of Ampere or newer and a 16-bit dtype; not measured on %s",
            device,
        )
    elif device.type != "cpu":
        logger.info("attention back end: %s (flash-attn: %s)", name, flash_attn_import_error() or "installed")


@cache
def flash_attn_import_error() -> str | None:
    """Why `flash_attn_varlen_func` cannot be imported, or None if it can.

    Imports the function itself. The package's presence proves nothing: flash-attn 4 installs a package of the same
    name without this function, and a wheel built for another torch fails only when it is loaded.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _best(device: torch.device, dtype: torch.dtype, import_error: str | None) -> str:
    if device.type == "cpu" and dtype == torch.float32:
        return "onednn" if is_faster_than_sdpa() else "sdpa"
    if dtype == torch.float32 or not has_varlen_kernels(device):
        return "sdpa"
    return "varlen" if import_error else "flash_attn"


def _check_cpu(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise ModelUnavailable(
            f"attention back end onednn needs a CPU with oneDNN, and float32; this is {device} in {dtype}. Use sdpa"
        )


def _check_gpu(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        raise ModelUnavailable(f"attention back end {name} needs CUDA; the device is {device}. Use sdpa")
    if dtype == torch.float32:
        raise ModelUnavailable(f"attention back end {name} needs a dtype of 16 bits, not float32. Use sdpa")
    if torch.version.hip:
        raise ModelUnavailable(f"attention back end {name} needs an NVIDIA GPU; {device} is one of AMD. Use sdpa")
    if not has_varlen_kernels(device):
        capability = torch.cuda.get_device_capability(device)
        raise ModelUnavailable(
            f"attention back end {name}: {device} has compute capability {capability}; allowed: {VARLEN_CAPABILITY} "
            "or newer. Use sdpa"
        )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
) -> Tensor:
    """The flash attention kernel that torch (2.11 or newer) contains, for CUDA.

    Calls the operator instead of `torch.nn.attention.varlen.varlen_attn`. That wrapper fills a tensor of random states
    in each layer, and its keyword arguments differ between torch 2.11 and 2.13.
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
        **num_splits_argument(),
    )[0]
    return attended


@cache
def num_splits_argument() -> dict[str, int]:
    """`num_splits=1` if torch's operator has that argument (2.13 has, 2.11 has not).

    With one split of the keys a vector does not depend on the other items of its batch. Without the argument the
    kernel may split the keys in the last layer, where each sequence has one query, by the size of the batch; vectors
    then differ by rounding.
    """
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    return {"num_splits": 1} if any(argument.name == "num_splits" for argument in arguments) else {}


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, *, causal: bool
) -> Tensor:
    """`flash_attn_varlen_func` of the flash-attn package, for CUDA.

    It takes no number of splits, so in the last layer it may split the keys by the size of the batch, as
    `num_splits_argument` says.
    """
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


_BACK_ENDS: dict[str, Attention] = {
    "flash_attn": flash_attention,
    "onednn": onednn_attention,
    "sdpa": sdpa_attention,
    "varlen": varlen_attention,
}
