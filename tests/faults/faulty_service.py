"""The service with a fault in a batch. For `bentoml serve`.

The file that `EMBEDDING_TESTS_FAULT` names says which fault and in how many batches, such as `hang 5`. It is renamed to
`*.injected` when the fault happens, with the time, so that it happens once and not in the next worker too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from embedder.engine.device import WaitForRows
from embedder.errors import DeviceFailed, DeviceOutOfMemory
from embedder.inputs.preprocess import ModelInput
from embedder.models import Models
from service import Qwen3VLEmbedding as Qwen3VLEmbedding

FILE = Path(os.environ["EMBEDDING_TESTS_FAULT"])
INJECTED = FILE.with_suffix(".injected")

launch = Models._launch
remaining: dict[str, int] = {}  # batches until the fault


def faulty_launch(self: Models, inputs: list[ModelInput]) -> WaitForRows:
    if FILE.exists():
        fault, number = FILE.read_text().split()
        remaining.setdefault(fault, int(number))
        remaining[fault] -= 1
        if not remaining[fault]:
            del remaining[fault]
            FILE.write_text(str(time.monotonic()))
            FILE.rename(INJECTED)
            happen(fault)
    return launch(self, inputs)


def happen(fault: str) -> None:
    match fault:
        case "error":
            raise DeviceFailed("AcceleratorError: CUDA error: device-side assert triggered")
        case "batch":
            raise RuntimeError("a kernel failed for this batch")
        case "memory":
            raise DeviceOutOfMemory("CUDA out of memory")
        case "hang":
            time.sleep(3600)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hold":
            ctypes.PyDLL(None).sleep(3600)  # a call by PyDLL keeps the GIL
        case "balloon":  # until the kernel ends the process
            taken = []
            while True:
                taken.append(b"x" * 2**24)


Models._launch = faulty_launch  # type: ignore[method-assign]
