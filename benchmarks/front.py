"""CPU time of the service around the model: `python -m benchmarks.front [--base COMMIT]`.

A null model computes nothing, so all time is that of HTTP, validation, tokenization, queue and serialization. It is the
CPU time of the service's processes: the load generator and other processes do not count. With `--base`, the service
of that commit runs too, in turns; a change is the median of the rounds' ratios, with a bootstrap interval of 95%. The
vectors have 192 values, as those of the bundled model; each 1,000 more take 0.014 ms to
write as JSON (`python -m benchmarks.micro`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import report
from benchmarks.contenders import ROOT, Contender
from benchmarks.guard import MAX_S, Change, Workload, change_of, find_commit, worktree
from benchmarks.load import NO_GZIP, drive
from benchmarks.meter import cpu_seconds
from benchmarks.protocols import LocalProtocol
from benchmarks.workloads import make_items, read_words

FILE = "front"
SINGLE, MANY = "single texts, 64 callers", "32 texts a request, 16 callers"
WORKLOADS = (
    Workload(SINGLE, "/txt/embed", "text-16", 1, 64, 4000),
    Workload(MANY, "/txt/embed", "text-16", 32, 16, 400),
    Workload("single texts, 1 caller", "/txt/embed", "text-16", 1, 1, 1000),
    Workload("single texts, 64 callers, OpenAI's route", "/v1/embeddings", "text-16", 1, 64, 4000),
)
GZIP = "single texts, 64 callers, response as gzip"  # which many clients ask for without being told
HEADERS = ("requests", "CPU ms an item", "before", "change", "95% interval")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="COMMIT", help="a commit to compare with")
    parser.add_argument("--base-python", type=Path, default=Path(sys.executable), help="its interpreter")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    base = find_commit(chosen.base) if chosen.base else None
    if chosen.base and base is None:
        parser.error(f"--base: got {chosen.base}; allowed: a commit of this repository")
    chosen.base = base
    about = report.environment(report.command(FILE, chosen))
    with contextlib.ExitStack() as stack:
        services = {"now": null_service("now", ROOT)}
        if base:
            services["base"] = null_service("base", stack.enter_context(worktree(base)), chosen.base_python)
        rounds = measure(services, chosen.rounds)
    rows = [_row(name, pairs) for name, pairs in rounds.items()]
    data = {"environment": about, "rows": rows}
    report.save(chosen.results, FILE, data, table(rows), _bars(rows), "CPU ms an item")
    print(table(rows))
    return data


def measure(services: dict[str, Contender], num_rounds: int) -> dict[str, list[dict[str, float]]]:
    """By workload: for each round, the CPU milliseconds of an item, by the name of the service."""
    words = read_words(ROOT / "embedder" / "default_model")
    bodies = {
        size: LocalProtocol().bodies(make_items("text-16", 1024, words), size)
        for size in {one.size for one in WORKLOADS}
    }
    loads = [(workload.name, workload, NO_GZIP) for workload in WORKLOADS] + [(GZIP, WORKLOADS[0], {})]
    times: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in loads}
    try:
        for service in services.values():
            service.start(bodies[1][0])
            service.pause()
        for number in tqdm(range(num_rounds + 1), desc="rounds", file=sys.stderr):  # the first one warms up
            order = list(services) if number % 2 else list(reversed(services))
            for name, workload, headers in loads:
                taken = {one: _cpu_ms(services[one], workload, bodies[workload.size], headers) for one in order}
                if number:
                    times[name].append(taken)
    finally:
        for service in services.values():
            service.stop()
    return times


def null_service(name: str, tree: Path, python: Path = Path(sys.executable)) -> Contender:
    """The service of a tree, with the bundled model's tokenizer and a model that computes nothing."""
    command = [str(python), "-m", "bentoml", "serve", "benchmarks.null_service:Qwen3VLEmbedding"]
    command += ["--host", "127.0.0.1", "--port", "PORT"]
    settings = {"PYTHONPATH": str(tree), "EMBEDDER_DEVICE": "cpu"}  # the bundled model is the default
    return Contender(name, command, "/txt/embed", settings, cwd=tree)


def _cpu_ms(service: Contender, workload: Workload, bodies: Sequence[bytes], headers: dict[str, str]) -> float:
    assert service.process is not None
    url = f"http://127.0.0.1:{service.port}{workload.path}"
    with service.awake():
        before_s = cpu_seconds(service.process.pid)
        load = asyncio.run(
            drive(
                url,
                bodies,
                concurrency=workload.num_callers,
                seconds=MAX_S,
                max_requests=workload.num_requests,
                headers=headers,
            )
        )
        spent_s = cpu_seconds(service.process.pid) - before_s
    if len(load.latencies_s) < workload.num_requests:
        raise RuntimeError(f"{service.name}, {workload.name}: only {len(load.latencies_s)} requests were answered")
    return spent_s / (workload.num_requests * workload.size) * 1e3


def _row(name: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {who: statistics.median(one[who] for one in rounds) for who in rounds[0]}
    if "base" in row:
        change = change_of([(one["base"], one["now"]) for one in rounds])
        row |= {"change": change.median, "low": change.low, "high": change.high}
    return {"workload": name, **row}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        change = Change(row["change"], row["low"], row["high"]) if "change" in row else None
        lines.append(
            (
                row["workload"],
                f"{row['now']:.3f}",
                f"{row['base']:.3f}" if change else "",
                f"{change.median:+.0%}" if change else "",
                f"{change.low:+.0%} to {change.high:+.0%}" if change else "",
            )
        )
    return report.table(HEADERS, lines)


def _bars(rows: Sequence[dict[str, Any]]) -> report.Bars:
    return {row["workload"]: {who: row[who] for who in ("base", "now") if who in row} for row in rows}


if __name__ == "__main__":
    main()
