"""What the engine does when a GPU has too little memory or fails. Only a real GPU can show it.

Each check returns {"result": "right" or "WRONG", ..} with what was seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_parts import exit_with_parent
from embedder.embedder import Embedder
from embedder.errors import DeviceFailed, EmbedderError

RIGHT, WRONG = "right", "WRONG"
TEXT = "red " * 400  # more tokens than a CUDA graph holds
NUM_TEXTS = 100  # several full batches
SHARE = 0.4  # of the memory that a full batch takes
MAX_DIFFERENCE = 1.5e-2  # between batches of other sizes, in bfloat16


def survive_full_memory(embedder: Embedder, less_memory: AbstractContextManager[object]) -> dict[str, Any]:
    """Embed while `less_memory` lets no full batch fit: every item gets its vector, and later batches are smaller."""
    texts = [f"{number} {TEXT}" for number in range(NUM_TEXTS)]
    expected = np.stack(embedder.embed(texts))
    with less_memory:
        found = embedder.embed(texts, errors="return")
        max_tokens = embedder.engine._batch_limit.max_tokens
    errors = [f"{type(one).__name__}: {one}" for one in found if isinstance(one, EmbedderError)]
    rows = zip(found, expected, strict=True)
    difference = max(
        (float(abs(one - row).max()) for one, row in rows if not isinstance(one, EmbedderError)), default=0
    )
    is_smaller = max_tokens < embedder.engine.settings.max_batch_tokens
    is_right = is_smaller and not errors and difference <= MAX_DIFFERENCE
    return {
        "result": RIGHT if is_right else WRONG,
        "failed_items": len(errors),
        "first_error": errors[0] if errors else "",
        "max_batch_tokens_after": max_tokens,
        "difference": difference,
    }


@contextmanager
def share_of_a_batch(embedder: Embedder) -> Iterator[None]:
    """Limit this process to the GPU memory that it keeps, and `SHARE` of what a full batch takes."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    kept = torch.cuda.memory_allocated()
    embedder.embed([TEXT] * NUM_TEXTS)
    taken = torch.cuda.max_memory_allocated() - kept
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(embedder.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + SHARE * taken) / total, embedder.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, embedder.device)


def notice_lost_device(folder: Path, device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Make the GPU fail for good, in a separate process. Right: the item's error is `DeviceFailed`, reported once."""
    with ProcessPoolExecutor(1, get_context("spawn"), exit_with_parent) as process:
        return process.submit(_lose_device, folder, device, options).result()


def _lose_device(folder: Path, device: str, options: dict[str, Any]) -> dict[str, Any]:
    reasons: list[str] = []
    embedder = Embedder(str(folder), device=device, on_failure=reasons.append, **options)
    two, outside = torch.zeros(2, device=embedder.device), torch.tensor([5], device=embedder.device)
    embedder.forward.call_between_layers(lambda: two[outside])  # an assertion in the kernel, which stays
    (error,) = embedder.embed([TEXT], errors="return")
    is_right = isinstance(error, DeviceFailed) and len(reasons) == 1
    return {"result": RIGHT if is_right else WRONG, "error": f"{type(error).__name__}: {error}", "reasons": reasons}
