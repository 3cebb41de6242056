"""The service with a simulated GPU, for `bentoml serve`; `benchmarks.pretended_gpu` starts it.

Launching a batch takes the Python of a forward pass over one short text; then the device is busy, which is a sleep. All
workers share the device: the file that the environment names holds the time until which it is busy. Each batch is a
line of a second file.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import no_model
from embedder.engine.device import WaitForRows
from embedder.engine.scheduler import ON_GPU
from embedder.inputs.preprocess import ModelInput
from embedder.model.packing import pack
from embedder.models import Models
from service import Qwen3VLEmbedding as Qwen3VLEmbedding

FULL_TOKENS = 16384  # of a batch that takes `BENCHMARK_FULL_MS`
FULL_S = float(os.environ["BENCHMARK_FULL_MS"]) / 1000
LEAST_S = 0.002
ONE_CALL = os.environ["BENCHMARK_LAUNCH"] == "one call"
FOLDER = Path(os.environ["BENCHMARK_DEVICE"])


def reserve_device(seconds: float) -> float:
    """The time at which the device has computed what was launched before, and then for so many seconds."""
    with (FOLDER / "busy-until").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (busy_until_s,) = struct.unpack("d", file.read(8))
        end_s: float = max(busy_until_s, time.monotonic()) + seconds
        file.seek(0)
        file.write(struct.pack("d", end_s))
    with (FOLDER / "batches").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"end_s": end_s, "busy_s": seconds}) + "\n")
    return end_s


def launch(models: Models, inputs: list[ModelInput]) -> WaitForRows:
    """Replaces `Models._launch`."""
    assert models.embedder is not None
    forward = models.embedder.forward
    merge_size = models.embedder.preprocessor.vision.merge_size
    pack(inputs, merge_size, forward.device)
    if not ONE_CALL:
        forward(pack(inputs[:1], merge_size, forward.device))
    end_s = reserve_device(max(LEAST_S, FULL_S * sum(one.cost for one in inputs) / FULL_TOKENS))
    rows = no_model(models, inputs)()

    def wait() -> Any:
        time.sleep(max(0.0, end_s - time.monotonic()))
        return rows

    return wait


def load(models: Models, *arguments: Any, **options: Any) -> None:
    """Replaces `Models.__init__`: as on a GPU, two short batches are in flight. Attention computes nothing here."""
    original_init(models, *arguments, **options)
    models.engine._max_in_flight = 2
    models.engine._inputs._batch_length = ON_GPU
    assert models.embedder is not None
    models.embedder.forward.language.attention = lambda query, *_, **__: torch.empty_like(query)


original_init = Models.__init__
Models.__init__ = load  # type: ignore[method-assign]
Models._launch = launch  # type: ignore[method-assign]
