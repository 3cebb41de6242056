"""The GPU script's own logic, on a CPU: what it does without a contestant or a part, and what it calls a fault."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("litserve", reason="the peers come with the `bench` extra")

from benchmarks import goals, gpu, gpu_faults, library, peers, report
from benchmarks.compare import compare
from benchmarks.gpu_parts import PartFile
from benchmarks.limits import Weights
from benchmarks.peers import Peer
from embedder import Embedder
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.model import eight_bit
from tests.conftest import ROOT

WORDS = ["red", "green", "blue", "cyan"]
SMALL = ["--device", "cpu", "--shapes", "tiny", "--parts"]

# Full memory and a lost device


@contextmanager
def little_memory(embedder: Embedder, max_tokens: int) -> Iterator[None]:
    """Every forward pass of more tokens raises what torch raises on a GPU that is full."""
    loaded: Any = embedder.models.embedder
    compute = loaded._rows

    def limited(inputs: list[ModelInput]) -> torch.Tensor:
        if sum(one.num_tokens for one in inputs) > max_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows: torch.Tensor = compute(inputs)
        return rows

    loaded._rows = limited
    try:
        yield
    finally:
        del loaded._rows


@pytest.fixture
def small_batches(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Embedder]:
    monkeypatch.setattr(gpu_faults, "NUM_TEXTS", 8)
    monkeypatch.setattr(gpu_faults, "TEXT", "red " * 20)
    with Embedder(str(random_checkpoint), device="cpu", max_batch_tokens=512, max_input_tokens=256) as embedder:
        yield embedder


def test_memory_for_a_part_of_a_batch_is_survived(small_batches: Embedder) -> None:
    found = gpu_faults.survive_full_memory(small_batches, little_memory(small_batches, 100))
    assert (found["result"], found["failed_items"], found["first_error"]) == (gpu_faults.RIGHT, 0, "")
    assert found["max_batch_tokens_after"] < 512


def test_items_that_fail_and_memory_that_was_enough_are_wrong(small_batches: Embedder) -> None:
    assert gpu_faults.survive_full_memory(small_batches, nullcontext())["result"] == gpu_faults.WRONG
    found = gpu_faults.survive_full_memory(small_batches, little_memory(small_batches, 0))
    assert (found["result"], found["failed_items"]) == (gpu_faults.WRONG, 8)


@pytest.mark.slow
def test_error_of_one_item_is_not_taken_for_a_lost_device(random_checkpoint: Path) -> None:
    """On a CPU, the index that ends a GPU's context is an error of the batch."""
    found = gpu_faults.notice_lost_device(random_checkpoint, "cpu", {})
    assert (found["result"], found["reasons"]) == (gpu_faults.WRONG, [])


# Contestants that do not work


def same_vectors(name: str) -> Peer:
    return Peer(name, lambda items: np.eye(64, dtype=np.float32)[[hash(str(item)) % 64 for item in items]])


@pytest.mark.parametrize("names", [[f"{peers.OURS}, compiled", peers.TRANSFORMERS], [peers.OURS], [peers.TRANSFORMERS]])
def test_workload_is_measured_without_the_contestants_that_failed(names: list[str], embedder: Embedder) -> None:
    comparison = compare(
        "query",
        [same_vectors(name) for name in names],
        WORDS,
        rounds=1,
        seconds=1,
        limit=lambda: 1.0,
        on_wrong=lambda _: None,
    )
    preprocess: Preprocessor = embedder.preprocessor
    row = library.figures(comparison, Weights(1, 1, 1, 1, 1), preprocess)
    assert list(row["who"]) == names
    assert math.isnan(row["who"][names[0]]["ratio"]) == (peers.TRANSFORMERS not in names)
    shapes = {"2b": {"rows": [{**row, "copy_limit_ms": 1.0}], "gaps": {}}}
    data = {"checks": [], "after_faults": {}, "shapes": shapes, "dtype": "bfloat16", "faults": []}
    assert "One query: " in gpu._text(data)
    found = goals._on_gpu("2b", "query", "call_ms")(data)
    assert (found is None) == (names == [peers.TRANSFORMERS])


# Parts


def test_fault_that_was_not_survived_is_a_fault_of_the_run(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "gpu-script-on-cpu-parts", "faults")
    part.step("full memory", lambda: {"result": gpu_faults.WRONG, "failed_items": 3})
    part.step("lost device", lambda: {"result": gpu_faults.RIGHT})
    faults = gpu.main([*SMALL, "--results", str(tmp_path)])["faults"]
    assert faults == ["faults, full memory: {'result': 'WRONG', 'failed_items': 3}"]
    text = (tmp_path / "gpu-script-on-cpu.md").read_text()
    assert "After a fault, lost device: right." in text
    assert json.loads((tmp_path / "gpu-script-on-cpu.json").read_text())["after_faults"]["full memory"]["failed_items"]


def test_fault_of_a_step_is_recorded_once_and_the_process_of_its_part_ends_well(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "random_folder", lambda _: nullcontext(random_checkpoint))
    monkeypatch.setattr(gpu, "exit_with_parent", lambda: None)
    step = ["--part", "faults", "--steps", "full memory", "--device", "cpu", "--results", str(tmp_path)]
    assert gpu.main(step) == {"faults": []}
    (fault,) = gpu.main([*SMALL, "--results", str(tmp_path)])["faults"]
    assert fault.startswith("faults, full memory: ModelUnavailable: attention back end varlen needs CUDA")


def test_needed_packages_are_those_that_are_named() -> None:
    """A machine with a GPU may have only these: a missing one ends the run before its first step."""
    known = {name.replace("-", "_") for name in re.findall(r"[\w-]+", gpu.__doc__ or "")}
    known |= {"PIL", "huggingface_hub", "numpy", "safetensors", "tokenizers"}  # of transformers
    ours = ("embedder", "benchmarks", "tests")
    program = f"""
import sys, benchmarks.gpu
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in {ours}))
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    imported: set[str] = set()
    for path in map(Path, loaded.stdout.split()):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    assert {"torch", "orjson"} <= imported
    assert {one.lstrip("_") for one in imported - sys.stdlib_module_names - {*ours}} <= known


def test_parts_of_another_machine_keep_its_name(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "gpu-script-on-cpu-parts", "speed-2b")
    part.update(environment={**report.environment(""), "gpu": "NVIDIA H200", "date": "2026-12-02"})
    environment = gpu.main([*SMALL, "--results", str(tmp_path)])["environment"]
    assert (environment["gpu"], environment["date"]) == ("NVIDIA H200", "2026-12-02")
    assert environment["command"].startswith("python -m benchmarks.gpu ")


def test_time_of_a_query_next_to_bulk_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "NUM_NEXT_TO_BULK", 3)
    found = gpu._next_to_bulk([same_vectors(peers.OURS)], WORDS)
    assert 0 < found[peers.OURS]["p50_ms"] <= found[peers.OURS]["p99_ms"]
    PartFile(tmp_path / "gpu-script-on-cpu-parts", "speed-2b").update(next_to_bulk=found)
    gpu.main([*SMALL, "--results", str(tmp_path)])
    assert "One query next to bulk: " in (tmp_path / "gpu-script-on-cpu.md").read_text()


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_configuration_that_the_gpu_does_not_have_is_left_out(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(gpu, "missing_for_triton", lambda: "")
    reason = gpu._missing(gpu.CONFIGURATIONS["cuda"][weights])
    assert reason.startswith("EMBEDDER_WEIGHTS=fp8 needs") if weights == "fp8" else reason == ""
    assert eight_bit.FP8_CAPABILITY > (8, 0)
