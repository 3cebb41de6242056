"""In bfloat16, `benchmarks.library` judges a peer's vectors by their distance to float32 vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import library, limits, peers
from benchmarks.compare import MAX_DISTANCE_RATIO, WrongVectors, compare
from benchmarks.peers import Peer
from benchmarks.workloads import Item
from embedder.model.onednn import PackedLinear
from embedder.model.products import can_pack

WORDS = ["red", "green", "blue", "cyan"]


def peer(name: str, noise: float, seed: int) -> Peer:
    """Random vectors, the same for every peer, plus `noise` of its own."""

    def embed(items: list[Item]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        exact = np.random.default_rng(0).normal(size=(2048, 64))[: len(items)]
        own = np.random.default_rng(seed).normal(size=exact.shape)
        return (exact + noise * own).astype(np.float32)

    return Peer(name, embed)


def run(noise_of_ours: float) -> None:
    contestants = [peer(peers.OURS, noise_of_ours, 1), peer(peers.TRANSFORMERS, 0.05, 2)]
    oracle = peer("float32", 0, 3)
    compare("text-16", contestants, WORDS, rounds=1, seconds=0.1, limit=lambda: 1.0, oracle=oracle)


def test_bfloat16_vectors_as_far_from_float32_as_transformers_are_right() -> None:
    """Although their cosine to those of transformers is below the minimum of float32."""
    run(noise_of_ours=0.05)
    contestants = [peer(peers.OURS, 0.05, 1), peer(peers.TRANSFORMERS, 0.05, 2)]
    with pytest.raises(WrongVectors, match=r"has cosine 0\.99"):
        compare("text-16", contestants, WORDS, rounds=1, seconds=0.1, limit=lambda: 1.0)


def test_bfloat16_vectors_much_farther_from_float32_than_transformers_are_wrong() -> None:
    noise = 0.05 * 1.5 * MAX_DISTANCE_RATIO**0.5  # the distance grows with the square of the noise
    with pytest.raises(WrongVectors, match=f"mean distance of {peers.OURS} to float32"):
        run(noise)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_library_command_runs_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("litserve", reason="the peers come with the `bench` extra")
    # Without bfloat16 instructions, the large product takes minutes.
    monkeypatch.setattr(library, "matrix_rate", lambda dtype, device: 1e9)
    command = ["--dtype", "bfloat16", "--shape", "tiny", "--workloads", "text-64", "--seconds", "2"]
    library.main([*command, "--results", str(tmp_path)])
    (row,) = json.loads((tmp_path / "library-tiny-bfloat16.json").read_text())["workloads"]
    assert 0.99 < row["who"][peers.OURS]["min_cosine"] < 1


@pytest.mark.skipif(not can_pack(torch.empty(0)), reason="torch is built without oneDNN")
@pytest.mark.parametrize(("packed_s", "expected_s"), [(0.5, 0.5), (2.0, 1.0)])
def test_limit_on_a_cpu_is_the_faster_product(
    packed_s: float, expected_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {nn.Linear: 1.0, PackedLinear: packed_s}
    monkeypatch.setattr(limits, "_median_s", lambda run, device: seconds[type(run.func)])
    assert limits.matrix_rate(torch.float32, torch.device("cpu")) == 2 * 2048**3 / expected_s
