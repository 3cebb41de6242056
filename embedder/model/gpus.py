"""The number of GPUs of the machine. Imports torch only if there may be one."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/kfd")  # NVIDIA, NVIDIA Jetson, AMD
DRIVERS = (*GPU_DRIVERS, "/dev/dxg")  # the last one is in every Linux on Windows, also without a GPU


def count_gpus() -> int:
    """Number of GPUs that torch can use, as `choose_device` assigns them: NVIDIA's and AMD's, or else Intel's.

    torch takes 2 s to import, so it is asked only where a GPU's driver is present, or a torch for Intel's GPUs. Their
    driver is no evidence: it is also that of most computers' displays.
    """
    has_driver = sys.platform != "linux" or any(Path(driver).exists() for driver in DRIVERS)
    if not has_driver and not _is_torch_for_intel():
        return 0
    import torch

    return torch.cuda.device_count() or torch.xpu.device_count()


def _is_torch_for_intel() -> bool:
    """Whether torch is a build such as 2.9.0+xpu. Other builds have no `xpu` devices."""
    return any(one.version.endswith("+xpu") for one in importlib.metadata.distributions(name="torch"))
