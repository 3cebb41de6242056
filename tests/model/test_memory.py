"""Weights that cannot fit are refused before they are loaded; what might fit is tried."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedder import Embedder
from embedder.errors import ModelUnavailable
from embedder.model import memory, weights
from embedder.model.memory import check_memory, free_bytes, weights_bytes
from embedder.model.progress import LoggedProgress
from embedder.model.weight_files import read_shapes
from embedder.model.weights import check_weights, load_model
from embedder.settings import WeightFormat

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 3 MiB free and 1 MiB of swap, without a container's limit. Its folder."""
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:   3072 kB\nSwapFree:  1024 kB\nHuge: 0\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def limit_memory(system: Path, limit: str, used: int = 0, inactive: int = 0, active: int = 0) -> None:
    """Put the system into a container, whose files are written as the kernel does."""
    (system / "memory.max").write_text(f"{limit}\n")
    (system / "memory.current").write_text(f"{used}\n")
    (system / "memory.stat").write_text(
        f"anon 4096\nfile 999\ninactive_anon 7\nactive_anon 7\ninactive_file {inactive}\nactive_file {active}\n"
    )


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_weights_are_counted_in_the_dtype_they_get(dtype: torch.dtype, size: int, random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint, dtype, CPU)
    num_weights = sum(one.numel() for one in model.parameters())
    assert weights_bytes(check_weights(random_checkpoint), dtype, CPU) == size * num_weights


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_head_of_an_untied_checkpoint_is_not_counted_and_the_progress_ends_at_its_total(
    weight_format: WeightFormat | None, write_random: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    def record(*args: Any, **options: Any) -> LoggedProgress:
        bars.append(LoggedProgress(*args, **options))
        return bars[-1]

    monkeypatch.setattr(weights, "LoggedProgress", record)
    folder = write_random(tied=False)
    assert "lm_head.weight" in read_shapes(folder)
    load_model(folder, torch.float32, CPU, weight_format)
    needed = check_memory(check_weights(folder), torch.float32, CPU, weight_format)
    assert [(bar.n, bar.total) for bar in bars] == [(needed, needed)]


@pytest.mark.parametrize(("limit", "free_mib"), [("max", 4), (str(2 * MIB), 2), ("99999999", 4), (None, 4)])
def test_memory_is_the_systems_within_the_containers_limit(limit: str | None, free_mib: int, system: Path) -> None:
    if limit:
        limit_memory(system, limit)
    assert free_bytes(CPU) == free_mib * MIB


@pytest.mark.parametrize(
    ("used_mib", "inactive_mib", "active_mib", "free_mib"), [(1, 0, 0, 2), (3, 1, 0, 1), (3, 1, 1, 2), (4, 0, 0, 0)]
)
def test_memory_that_the_container_uses_is_not_free_except_for_cached_files(
    used_mib: int, inactive_mib: int, active_mib: int, free_mib: int, system: Path
) -> None:
    limit_memory(system, str(3 * MIB), used_mib * MIB, inactive_mib * MIB, active_mib * MIB)
    assert free_bytes(CPU) == free_mib * MIB


def test_real_system_has_some_and_less_than_a_petabyte() -> None:
    free = free_bytes(CPU)
    assert free is None or 2**20 < free < 2**50


def test_what_does_not_fit_is_refused_with_both_numbers(system: Path, random_checkpoint: Path) -> None:
    limit_memory(system, "1000")
    with pytest.raises(ModelUnavailable, match=r"the weights take 0\.0 GiB as float32; cpu has 0\.0 GiB free"):
        check_memory(check_weights(random_checkpoint), torch.float32, CPU)
    with pytest.raises(ModelUnavailable, match="EMBEDDER_DTYPE=bfloat16"):
        Embedder(random_checkpoint, device="cpu")


def test_where_the_system_does_not_say_it_is_tried(system: Path, random_checkpoint: Path) -> None:
    os.remove(system / "meminfo")
    check_memory(check_weights(random_checkpoint), torch.float32, CPU)


@pytest.mark.gpu
def test_gpu_has_memory_and_not_for_everything(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(check_weights(random_checkpoint), torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(memory, "weights_bytes", lambda *_: 2**50)
    with pytest.raises(ModelUnavailable, match="cuda has "):
        check_memory(check_weights(random_checkpoint), torch.bfloat16, torch.device("cuda"))


CHURN = """
import resource, torch
from embedder.model.memory import keep_freed_memory
def pages_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(7_500_000) for _ in range(3)]  # 30 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
print(min([pages_taken() for _ in range(12)][6:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other settings")
@pytest.mark.parametrize(("variable", "is_kept"), [("", True), ("MALLOC_TRIM_THRESHOLD_", False)])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(variable: str, is_kept: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {variable: str(2**17)} if variable else {}
    pages = int(subprocess.check_output([sys.executable, "-c", CHURN], env=environment))
    assert pages < 100 if is_kept else pages > 20_000
