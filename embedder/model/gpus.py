"""The number of GPUs of the machine. Imports torch only if there may be one."""

from __future__ import annotations

import sys
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/kfd", "/dev/dxg")  # NVIDIA, NVIDIA Jetson, AMD, Windows' Linux


def count_gpus() -> int:
    """Number of GPUs that torch can use.

    torch takes 2 s to import, so it is asked only where a GPU's driver is present.
    """
    if sys.platform == "linux" and not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()
