"""Time the peers on one workload, in rounds that take turns (A B C A B C), and check every vector."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.peers import TRANSFORMERS, Peer
from benchmarks.workloads import Item, is_one_at_a_time, make_items

MIN_COSINE = 0.999
MAX_DISTANCE_RATIO = 1.5  # mean distance to float32 vectors, over that of transformers in the same dtype
PROBES = (4, 64, 512)  # items; a few do not predict the speed of many
MIN_ITEMS, MAX_ITEMS = 4, 2048
ONE_AT_A_TIME_ITEMS = 20


class WrongVectors(AssertionError):
    """A peer's vectors are wrong, so its speed means nothing."""


def _raise(message: str) -> None:
    raise WrongVectors(message)


@dataclass
class Timing:
    """A peer's times in one workload.

    `seconds`: of each call of `items_per_call` items. `peak_bytes`: of device memory, above what was allocated before.
    """

    items_per_call: int
    min_cosine: float = 1.0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def items_per_s(self) -> float:
        return self.items_per_call / self.median_s


@dataclass
class Comparison:
    """One workload: its items, each peer's timing, and `limits`, the matrix rate measured in each round (FLOP/s)."""

    workload: str
    items: list[Item]
    timings: dict[str, Timing]
    limits: list[float] = field(default_factory=list)


def compare(
    workload: str,
    peers: Sequence[Peer],
    words: list[str],
    *,
    rounds: int,
    seconds: float,
    limit: Callable[[], float],
    min_cosine: float = MIN_COSINE,
    oracle: Peer | None = None,
    on_wrong: Callable[[str], object] = _raise,
) -> Comparison:
    """Time the peers in turns, with as many items as they embed `rounds` times in `seconds`; the first peer is ours.

    Stops after the round in which `seconds` are over. A wrong vector calls `on_wrong`, which raises `WrongVectors` by
    default.

    Without `oracle`, the cosine of each vector to that of the first peer must be at least `min_cosine`. With `oracle`,
    which embeds in float32, each peer's mean distance to it must be at most `MAX_DISTANCE_RATIO` times that of
    transformers.
    """
    count = _affordable_count(workload, peers, words, seconds / (rounds + 1))
    items = make_items(workload, count, words)
    calls = [[item] for item in items] if is_one_at_a_time(workload) else [items]
    comparison = Comparison(workload, items, {peer.name: Timing(len(calls[0])) for peer in peers})
    _check(peers, calls, comparison, min_cosine, oracle, on_wrong)
    deadline = time.perf_counter() + seconds
    for _ in tqdm(range(rounds), desc=f"{workload} x {count}", unit="round", leave=False):
        comparison.limits.append(limit())
        for peer in peers:
            comparison.timings[peer.name].seconds += [_seconds(peer, call) for call in calls]
        if time.perf_counter() > deadline:
            break
    return comparison


def _affordable_count(workload: str, peers: Sequence[Peer], words: list[str], seconds: float) -> int:
    """The number of items that all peers together embed once in `seconds`; from 32 on, a multiple of 32."""
    if is_one_at_a_time(workload):
        return ONE_AT_A_TIME_ITEMS
    count = float(PROBES[0])
    for probe in PROBES:
        if count < probe:
            break
        items = make_items(workload, probe, words)
        count = seconds * probe / sum(_warm_seconds(peer, items) for peer in peers)
    bounded = int(min(max(count, MIN_ITEMS), MAX_ITEMS))
    return bounded - bounded % 32 if bounded >= 32 else bounded


def _warm_seconds(peer: Peer, items: list[Item]) -> float:
    peer.embed(items)
    return _seconds(peer, items)


def _seconds(peer: Peer, items: list[Item]) -> float:
    start = time.perf_counter()
    peer.embed(items)  # returns vectors on the host, so no synchronization is needed
    return time.perf_counter() - start


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """At unit length. sentence-transformers normalizes in bfloat16, with lengths up to 0.3 % off."""
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def _check(
    peers: Sequence[Peer],
    calls: list[list[Item]],
    comparison: Comparison,
    min_cosine: float,
    oracle: Peer | None,
    on_wrong: Callable[[str], object],
) -> None:
    """Every peer embeds all items once, which is also the warm-up, and its vectors are compared."""
    vectors: dict[str, NDArray[np.float32]] = {}
    for peer in peers:
        held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        vectors[peer.name] = np.concatenate([peer.embed(call) for call in calls])
        if torch.cuda.is_available():
            comparison.timings[peer.name].peak_bytes = torch.cuda.max_memory_allocated() - held
    first = peers[0].name
    expected = unit(vectors[first] if oracle is None else np.concatenate([oracle.embed(call) for call in calls]))
    distances = {}
    for name, found in vectors.items():
        cosines = unit(found) @ expected.T
        own = cosines.diagonal()
        comparison.timings[name].min_cosine = float(own.min())
        distances[name] = float(np.mean(1 - own))
        if oracle is None and not own.min() >= min_cosine:
            on_wrong(f"{comparison.workload}: a vector of {name} has cosine {own.min():.6f} to {first}")
        if not (cosines.max(axis=1) <= own + 1e-3).all():
            on_wrong(f"{comparison.workload}: a vector of {name} is nearer to another item's than to its own")
    for name, distance in distances.items():
        if oracle is not None and not distance <= MAX_DISTANCE_RATIO * distances[TRANSFORMERS]:
            on_wrong(
                f"{comparison.workload}: the mean distance of {name} to float32 vectors is {distance:.2e}; that of "
                f"{TRANSFORMERS} is {distances[TRANSFORMERS]:.2e}, {MAX_DISTANCE_RATIO} times as much is allowed"
            )
