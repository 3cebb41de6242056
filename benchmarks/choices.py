"""Measure the effect of single design decisions: `python -m benchmarks.choices`.

1. Variants of the forward pass on the CPU, with the same weights, one batch of each workload. Times are relative to
   ours (above 1 is slower), and every variant must give the same vectors. The torch.compile variant needs a C++
   compiler. With `--dtype bfloat16`, only this part is measured.
2. Texts of mixed lengths through the library, in batches of different numbers of tokens.
3. Short texts through the library with a model that computes nothing, preprocessed on the calling thread or in threads.
4. The duration of a garbage collection with and without the loaded objects.
5. The service with Python's default and shorter switch intervals: its throughput without computation, and how long
   probes and texts take while a thread of the service refuses costly bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks import contenders, report
from benchmarks.checkpoints import random_folder
from benchmarks.library import load_preprocessor
from benchmarks.limits import no_model
from benchmarks.load import drive
from benchmarks.protocols import LocalProtocol
from benchmarks.workloads import make_items, read_words
from embedder import loaded_model, models
from embedder.embedder import Embedder
from embedder.engine.scheduler import BatchLength
from embedder.inputs import preprocess
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import ModelInput
from embedder.model import execution, language, products
from embedder.model.checkpoint import BUNDLED
from embedder.model.positions import apply_rotary
from embedder.models import Models
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm  # noqa: E402 - after the declaration

BATCHES = {"query": 1, "text-16": 64, "text-512": 8, "text-2048": 1, "image-448": 4}  # items of each workload
BATCH_TOKENS = (256, 512, 1024, 2048, 16384)  # ours: 1024, if they take 0.25 s or more
OURS = "ours"
MAX_DIFFERENCES = {"float32": 1e-4, "bfloat16": 0.5}  # between rows before normalization, whose values are a few units
SWITCH_INTERVALS_S = (0.005, 0.001, 0.0002, 0.0001)  # the first is Python's default
CALLERS = 64
_SET_INTERVAL = "import sys\nsys.setswitchinterval({})\nsys.setswitchinterval = lambda _: None  # the service's own\n"
# Refusing it keeps a thread busy for some tenths of a second.
COSTLY = json.dumps({"items": [{f"field{number}_{place}": 1 for place in range(5)} for number in range(2048)]}).encode()
PROBE = ("GET", "/livez")
TEXT = ("POST", "/txt/embed", json.dumps({"input": "red"}), {"content-type": "application/json"})

Run = Callable[[list[ModelInput]], NDArray[np.float32]]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Measure the effect of single design decisions.")
    parser.add_argument("--shape", choices=("tiny", "small"), default="small")
    parser.add_argument("--dtype", choices=MAX_DIFFERENCES, default="float32")
    parser.add_argument("--workloads", nargs="+", choices=BATCHES, default=list(BATCHES), help="of the forward passes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=5, help="per switch interval and round")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command("choices", chosen))
    with random_folder(chosen.shape) as folder:
        times = _forward_times(folder, chosen.workloads, chosen.dtype, chosen.rounds)
        if chosen.dtype != "float32":
            return _save(f"choices-{chosen.dtype}", {"environment": about, "times": times}, [], chosen.results)
        items_per_s = _batch_lengths(folder, chosen.rounds)
        texts_per_s = _short_texts(folder)
        pauses_ms = _pauses_ms()
        intervals = asyncio.run(_switch_intervals(folder, chosen.seconds))
    data = {
        "environment": about,
        "times": times,
        "items_per_s": items_per_s,
        "texts_per_s": texts_per_s,
        "pauses_ms": pauses_ms,
        "switch_intervals": intervals,
    }
    parts = [
        report.table(
            ("tokens of a batch, at most", "items/s, text-mixed"),
            [[tokens, report.number(rate)] for tokens, rate in items_per_s.items()],
        ),
        report.table(
            ("short texts, preprocessed", "texts/s, null model"),
            [[name, f"{rate:.0f}"] for name, rate in texts_per_s.items()],
        ),
        report.table(("a full garbage collection", "ms"), [[name, f"{ms:.1f}"] for name, ms in pauses_ms.items()]),
        report.table(
            (
                "switch interval, ms",
                f"requests/s, null model, {CALLERS} callers",
                "probe next to costly bodies, ms",
                "p90",
                "text, bundled model, next to costly bodies, ms",
                "p90",
            ),
            [
                [
                    name,
                    f"{one['requests_per_s']:.0f}",
                    *(f"{one[key]:.1f}" for key in ("probe_ms", "probe_p90_ms", "text_ms", "text_p90_ms")),
                ]
                for name, one in intervals.items()
            ],
        ),
    ]
    return _save("choices", data, parts, chosen.results)


def _save(name: str, data: dict[str, Any], parts: list[str], folder: Path) -> dict[str, Any]:
    """Save and print the times of the forward passes, and after them the tables of the other parts."""
    times = data["times"]
    variants = list(next(iter(times.values())))
    forward = report.table(
        ("forward pass, time relative to ours", *times),
        [[variant, *(f"{of_one[variant]:.2f}" for of_one in times.values())] for variant in variants],
    )
    text = "\n\n".join([forward, *parts])
    report.save(folder, name, data, text, times, "time relative to ours")
    print(text)
    return data


def _forward_times(folder: Path, workloads: Sequence[str], dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Times by workload and variant, relative to ours."""
    with contextlib.ExitStack() as stack:
        variants = {
            name: make(stack.enter_context(_embedder(folder, dtype=dtype, **options)))
            for name, make, options in _variants(dtype)
        }
        to_input, words = load_preprocessor(folder), read_words(folder)
        relative = {}
        for workload in tqdm(workloads, desc="forward passes", unit="workload"):
            items = make_items(workload, BATCHES[workload], words)
            inputs = [to_input(item_from_fields(item)) for item in items]
            expected = variants[OURS](inputs)
            for name, run in variants.items():
                difference = float(np.abs(run(inputs) - expected).max())
                if not difference <= (allowed := MAX_DIFFERENCES[dtype]):
                    raise SystemExit(f"{name} gives other vectors: difference {difference}, allowed {allowed}")
            seconds: dict[str, list[float]] = {name: [] for name in variants}
            for number in range(rounds):
                # Shuffled: after a variant that takes long, the next one finds less of its data in the caches.
                for name in np.random.default_rng(number).permutation(list(variants)):
                    run = variants[name]
                    start = time.perf_counter()
                    run(inputs)
                    seconds[name].append(time.perf_counter() - start)
            ours = statistics.median(seconds[OURS])
            relative[workload] = {name: statistics.median(one) / ours for name, one in seconds.items()}
    return relative


def _embedder(folder: Path, product: str = "", dtype: Any = "float32", **options: Any) -> Embedder:
    """An Embedder on the CPU with the given matrix product; empty: the one that it chooses itself."""
    with contextlib.ExitStack() as stack:
        if product:
            stack.enter_context(mock.patch.object(products, "fastest_product", return_value=product))
        return Embedder(str(folder), device="cpu", dtype=dtype, **options)


def _variants(dtype: str) -> Iterator[tuple[str, Callable[[Embedder], Run], dict[str, Any]]]:
    """The name of each variant, a function that applies it to an Embedder, and the arguments of `_embedder`."""
    yield OURS, _as_it_is, {}
    yield "prefixes computed for each item", _without_prefixes, {}
    yield "norms as transformers' modules", _with_norm_modules, {}
    yield "torch's matrix product", _as_it_is, {"product": "torch"}
    yield "oneDNN's matrix product, weights packed", _as_it_is, {"product": "oneDNN"}
    yield "torch's attention", _as_it_is, {"attention": "sdpa"}
    if dtype == "float32":
        yield "attention by oneDNN's products", _as_it_is, {"attention": "onednn"}
    else:
        yield "norms by torch, rotations in 16 bits", _with_narrow_rotations, {}
    yield "MLPs and rotations of all rows at once", _with_all_rows, {}
    yield "all items of a batch together, no halves", _without_halves, {}
    if shutil.which("c++"):
        yield "layers by torch.compile", _as_it_is, {"execution": "compiled"}


def _as_it_is(embedder: Embedder) -> Run:
    return lambda inputs: embedder.models._launch(inputs)()


def _without_prefixes(embedder: Embedder) -> Run:
    return lambda inputs: embedder.models._launch([one._replace(num_prefix_tokens=0) for one in inputs])()


def _with_norm_modules(embedder: Embedder) -> Run:
    return _patched(embedder, language, _rms_norm=Qwen3VLTextRMSNorm.forward)


def _with_narrow_rotations(embedder: Embedder) -> Run:
    return _patched(embedder, language, _normalized=_normalized_by_torch, _rotated=_rotated_in_16_bits)


def _normalized_by_torch(states: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    return F.rms_norm(states, states.shape[-1:], weight, epsilon)


def _rotated_in_16_bits(attention: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normed = _normalized_by_torch(heads, None, attention.q_norm.variance_epsilon)
    return apply_rotary(normed[:, : len(attention.qk_norm_weight)].mul_(attention.qk_norm_weight), cos, sin)


def _with_all_rows(embedder: Embedder) -> Run:
    return _patched(embedder, execution, CPU_ROWS=sys.maxsize)


def _without_halves(embedder: Embedder) -> Run:
    return _patched(embedder, loaded_model, split=lambda _: None)


def _patched(embedder: Embedder, module: ModuleType, **values: object) -> Run:
    def run(inputs: list[ModelInput]) -> NDArray[np.float32]:
        with mock.patch.multiple(module, **values):
            return embedder.models._launch(inputs)()

    return run


def _batch_lengths(folder: Path, rounds: int, num_items: int = 256) -> dict[int, float]:
    """Items per second through the library by the largest number of tokens of a batch, medians of the rounds."""
    items = make_items("text-mixed", num_items, read_words(folder))
    rates: dict[int, list[float]] = {tokens: [] for tokens in BATCH_TOKENS}
    with contextlib.ExitStack() as stack:
        embedders = {}
        for tokens in BATCH_TOKENS:
            with mock.patch.object(models, "ON_CPU", BatchLength(0.0, tokens)):
                embedders[tokens] = stack.enter_context(_embedder(folder))
        for number in range(rounds + 1):  # the first one warms up
            for tokens, embedder in embedders.items():
                start = time.perf_counter()
                embedder.embed(items)
                if number:
                    rates[tokens].append(len(items) / (time.perf_counter() - start))
    return {tokens: statistics.median(found) for tokens, found in rates.items()}


def _short_texts(folder: Path) -> dict[str, float]:
    """Texts per second through the library, medians of five rounds."""
    items = make_items("text-16", 64, read_words(folder)) * 32
    limits = {"ours: where they come in": preprocess.SHORT_CHARS, "in threads": -1}
    rates: dict[str, list[float]] = {name: [] for name in limits}
    with mock.patch.object(Models, "_launch", no_model), Embedder(str(folder), device="cpu") as embedder:
        for _ in range(5):
            for name, limit in limits.items():
                with mock.patch.object(preprocess, "SHORT_CHARS", limit):
                    start = time.perf_counter()
                    embedder.embed(items)
                    rates[name].append(len(items) / (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def _pauses_ms() -> dict[str, float]:
    def collection_ms() -> float:
        start = time.perf_counter()
        gc.collect()
        return (time.perf_counter() - start) * 1e3

    gc.collect()
    unfrozen = statistics.median(collection_ms() for _ in range(5))
    gc.freeze()
    frozen = statistics.median(collection_ms() for _ in range(5))
    gc.unfreeze()
    return {"of all that is loaded": unfrozen, "ours: frozen after loading": frozen}


async def _switch_intervals(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """By switch interval in ms: requests per second, the median of three rounds, and latencies of probes and texts."""
    bodies = LocalProtocol().bodies(make_items("text-16", 64, read_words(folder)), 1)
    services = {"null": ("benchmarks.null_service:Qwen3VLEmbedding", folder), "text": (".", BUNDLED)}
    with contextlib.ExitStack() as stack:
        servers = {}
        for interval_s in SWITCH_INTERVALS_S:
            startup = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (startup / "sitecustomize.py").write_text(_SET_INTERVAL.format(interval_s))
            path = os.pathsep.join((str(startup), str(contenders.ROOT)))
            for kind, (target, model) in services.items():
                one = contenders.service(kind, target, model, "/txt/embed")
                one.environment = {**one.environment, "PYTHONPATH": path}
                stack.callback(one.stop)
                one.start(bodies[0])
                servers[f"{interval_s * 1e3:g}", kind] = one
        names = list(dict.fromkeys(name for name, _ in servers))
        rates, probes_s, texts_s = ({name: list[float]() for name in names} for _ in range(3))
        for _ in range(3):
            for name in names:
                load = await drive(servers[name, "null"].url, bodies, concurrency=CALLERS, seconds=seconds)
                rates[name].append(load.requests_per_s)
                probes_s[name] += await _latencies_s(servers[name, "null"].port, PROBE, seconds)
                texts_s[name] += await _latencies_s(servers[name, "text"].port, TEXT, seconds)
    return {
        name: {
            "requests_per_s": statistics.median(rates[name]),
            "probe_ms": statistics.median(probes_s[name]) * 1e3,
            "probe_p90_ms": statistics.quantiles(probes_s[name], n=10)[-1] * 1e3,
            "text_ms": statistics.median(texts_s[name]) * 1e3,
            "text_p90_ms": statistics.quantiles(texts_s[name], n=10)[-1] * 1e3,
        }
        for name in names
    }


async def _latencies_s(port: int, request: Sequence[Any], seconds: float) -> list[float]:
    """The latencies of a request that is repeated while other callers send costly bodies."""
    costly = drive(f"http://127.0.0.1:{port}/embed", [COSTLY], concurrency=2, seconds=seconds)
    _, latencies_s = await asyncio.gather(costly, asyncio.to_thread(_repeat, port, request, seconds))
    return latencies_s


def _repeat(port: int, request: Sequence[Any], seconds: float) -> list[float]:
    """The latencies of equal requests, one every 20 ms, each on a connection of its own."""
    latencies_s = []
    end_s = time.perf_counter() + seconds
    while (begin_s := time.perf_counter()) < end_s:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(*request)
        connection.getresponse().read()
        connection.close()
        latencies_s.append(time.perf_counter() - begin_s)
        time.sleep(0.02)
    return latencies_s


if __name__ == "__main__":
    main()
