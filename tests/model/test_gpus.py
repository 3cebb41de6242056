"""GPUs are counted as workers are assigned to them, and without torch where there cannot be one."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedder.model import gpus
from embedder.model.gpus import count_gpus
from tests.conftest import ROOT


class Build:
    """An installed torch of this version."""

    def __init__(self, version: str) -> None:
        self.version = version


@pytest.mark.parametrize(
    ("has_driver", "version", "num_cuda", "num_xpu", "expected"),
    [
        (True, "2.9.0", 2, 0, 2),
        (True, "2.9.0", 0, 0, 0),
        (False, "2.9.0+xpu", 0, 2, 2),
        (False, "2.9.0+cpu", 9, 9, 0),  # torch is not asked
    ],
)
def test_gpus_of_every_maker_are_counted(
    has_driver: bool,
    version: str,
    num_cuda: int,
    num_xpu: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(gpus, "DRIVERS", (str(tmp_path if has_driver else tmp_path / "none"),))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [Build(version)] if name == "torch" else [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: num_xpu)
    assert count_gpus() == expected


@pytest.mark.skipif(
    sys.platform != "linux" or any(Path(driver).exists() for driver in gpus.DRIVERS) or gpus._is_torch_for_intel(),
    reason="needs Linux without a GPU's driver",
)
def test_torch_is_not_imported_where_there_is_no_gpu() -> None:
    code = "import sys; from embedder.model.gpus import count_gpus; print(count_gpus(), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "0 False\n"
