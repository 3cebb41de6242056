"""The bundled model on a CPU whose cores other processes use too: `python -m benchmarks.busy`.

Runs each wait policy of OpenMP (GCC's libgomp) in a process of its own, next to busy loops, one on each core, and
without them. Prints the median and 90th percentile of a text query, and texts per second in bulk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context

from benchmarks import report

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
POLICIES = ("embedder's own", "spinning", "0")  # spinning: OpenMP's default; 0: sleep at once


def main(arguments: Sequence[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="for each figure")
    parser.add_argument("--policy", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.policy:
        print(json.dumps(measure(chosen.seconds)))
        return []
    rows: list[dict[str, object]] = []
    for num_loops in (0, os.cpu_count() or 1):
        with busy_loops(num_loops, 12 * chosen.seconds * len(POLICIES)):
            rows += [{"busy loops": num_loops, "policy": policy, **run(policy, chosen.seconds)} for policy in POLICIES]
    print(report.table(tuple(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    return rows


def run(policy: str, seconds: float) -> dict[str, object]:
    """The figures of one wait policy, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if policy == "spinning":
        environment["GOMP_SPINCOUNT"] = "300000"  # libgomp's default where threads are no more than cores
    elif policy == "0":
        environment["GOMP_SPINCOUNT"] = "0"
    command = [sys.executable, "-m", "benchmarks.busy", "--policy", policy, "--seconds", str(seconds)]
    output = subprocess.run(  # noqa: S603 - our own module
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    figures: dict[str, object] = json.loads(output.splitlines()[-1])
    return figures


def measure(seconds: float) -> dict[str, float]:
    """Milliseconds of a query, and texts per second in bulk."""
    from embedder import Embedder

    with Embedder(device="cpu") as embedder:
        embedder.embed(["warm up"] * 50)
        times = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            start = time.perf_counter()
            embedder.embed([f"query {len(times)}"])
            times.append(time.perf_counter() - start)
        num_texts, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            embedder.embed([f"text {num_texts + index}" for index in range(64)])
            num_texts += 64
        per_s = num_texts / (time.perf_counter() - start)
    return {
        "p50 ms": round(statistics.median(times) * 1e3, 1),
        "p90 ms": round(statistics.quantiles(times, n=10)[-1] * 1e3, 1),
        "texts/s": round(per_s),
    }


@contextmanager
def busy_loops(count: int, max_s: float) -> Iterator[None]:
    """Processes that compute without a pause until the block ends, or for `max_s`."""
    context = get_context("spawn")  # the caller's libraries may not survive a fork
    loops = [context.Process(target=spin, args=(max_s,), daemon=True) for _ in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.terminate()
            loop.join()


def spin(max_s: float) -> None:
    """Compute without a pause."""
    deadline = time.monotonic() + max_s
    while time.monotonic() < deadline:
        pass


if __name__ == "__main__":
    main()
