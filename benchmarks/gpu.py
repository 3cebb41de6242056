"""Correctness and speed on one GPU: `python -m benchmarks.gpu`, 10 minutes by default.

checks  Each configuration of the engine against the oracle (plain transformers, float32, CPU) on small random
        checkpoints, and the difference of a vector by itself and in a batch.
faults  Whether every item gets its vector when the memory is full, and whether a failed GPU is noticed.
speed   The 2B and 8B shapes, with random weights made on the device, through every workload, against transformers and
        sentence-transformers: shares of the matrix rate and of the copy rate measured in the same run, gaps between
        kernels, peak memory, and the time of a query next to bulk.

Each check and each shape runs in a process of its own with a time limit, and every result is written at once to
`results/gpu-parts/`. A fault ends one step; its process is started again for the steps after it. The parts on disk are
merged into `results/gpu.json`, also those of an earlier run or of another machine: `--shapes 2b` and `--shapes 8b` can
be two runs, and `--parts` without a value only merges. The exit status is 1 if any fault was recorded.

Needs torch >= 2.11, transformers >= 5.17, sentence-transformers and small packages (av, httpcore, orjson, pi-heif,
psutil, pybase64, pydantic, qwen-vl-utils, tqdm; matplotlib for the plot), but not BentoML. `--device cpu --shapes tiny`
runs the whole script on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import library, peers, report
from benchmarks.checkpoints import random_folder, tokenizer
from benchmarks.compare import Comparison, compare, unit
from benchmarks.gaps import launch_gaps
from benchmarks.gpu_faults import RIGHT, WRONG, notice_lost_device, share_of_a_batch, survive_full_memory
from benchmarks.gpu_parts import PartFile, exit_with_parent, read_parts, run_part
from benchmarks.limits import Weights, copy_rate, matrix_rate
from benchmarks.random_checkpoint import SHAPES, shape_config
from benchmarks.workloads import WORKLOADS, make_items, read_words
from embedder.embedder import Embedder
from embedder.errors import ModelUnavailable
from embedder.inputs.preprocess import Preprocessor
from embedder.model.architecture import Architecture
from embedder.model.eight_bit import check_weight_format
from embedder.model.execution import missing_for_triton
from embedder.model.modules import Towers
from embedder.torchvision_shim import declare_torchvision_operators
from tests.oracle import Oracle

declare_torchvision_operators()

from transformers import Qwen3VLModel  # noqa: E402 - after the declaration

CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {  # by device, then by name: settings of the engine
    "cuda": {
        "eager": {"attention": "varlen", "execution": "eager"},
        "CUDA graphs": {"attention": "varlen", "execution": "graphs"},
        "compiled": {"attention": "varlen", "execution": "compiled"},
        "CUDA graphs, compiled": {"attention": "varlen", "execution": "graphs+compiled"},
        "flash_attn": {"attention": "flash_attn", "execution": "eager"},
        "int8": {"attention": "varlen", "execution": "graphs+compiled", "weights": "int8"},
        "fp8": {"attention": "varlen", "execution": "graphs+compiled", "weights": "fp8"},
    },
    "cpu": {"eager": {"attention": "sdpa", "execution": "eager"}},
}
PARTS = ("checks", "faults", "speed")
FAULTS = ("full memory", "lost device")
CHECK_SHAPES = {"cuda": ("tiny", "small"), "cpu": ("tiny",)}
CHECKED = ("text-16", "text-mixed", "image-256", "half-half")
PROFILED = ("query", "text-64", "text-512", "image-448")  # workloads whose gaps between kernels are measured
ROUNDS = 3
ROUNDING = {"int8": 1e-3, "fp8": 5e-2}  # of weights in 8 bits: distance to the oracle that is allowed in addition
MIN_COSINE = 0.99  # between two bfloat16 forward passes of up to 36 random layers; the checks are stricter
# Between a vector by itself and in a batch. cuBLAS takes other kernels for other numbers of rows, and bfloat16 alone
# differs from float32 by up to 6e-3 in these vectors.
MAX_BATCH_DIFFERENCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-6}
CHECK_SECONDS = 150  # for all configurations of a shape
FIELDS = ("date", "device", "weight_gb", "rates", "loading_s", "next_to_bulk")  # of a part with the speed of a shape
NUM_NEXT_TO_BULK = 50  # queries


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    chosen = _parse(arguments)
    if chosen.part:
        exit_with_parent()
        part = PartFile(_folder(chosen), chosen.part)
        part.update(environment=report.environment(""))
        {"checks": _check, "faults": _cause_faults, "speed": _measure}[chosen.part.partition("-")[0]](part, chosen)
        return {"faults": []}  # they are in the file; the process has ended well
    options = {name: value for name, value in vars(chosen).items() if name not in ("part", "steps", "no_checks")}
    about = report.environment(report.command("gpu", argparse.Namespace(**options)))
    deadline = time.monotonic() + chosen.seconds
    steps = _parts(chosen)
    for index, name in enumerate(steps):
        left = deadline - time.monotonic()
        seconds = left / (len(steps) - index) if name.startswith("speed") else min(CHECK_SECONDS, left)
        run_part(_folder(chosen), name, steps[name], max(seconds, 1.0), partial(_command, name, chosen))
        _merge(chosen, about)
    data, text = _merge(chosen, about)
    if importlib.util.find_spec("matplotlib"):
        bars = {f"{shape} {row}": one for shape, found in data["shapes"].items() for row, one in _bars(found).items()}
        report.save(chosen.results, _name(chosen), data, text, bars, "x transformers")
    print(text)
    return data


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none: only merge what is there")
    parser.add_argument("--no-checks", action="store_true", help="the same as --parts speed")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["2b", "8b"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=540, help="for everything; each part may take 2 minutes more")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # in the process of one part: its name
    parser.add_argument("--steps", nargs="*", default=[], help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.no_checks:
        chosen.parts = [part for part in chosen.parts if part != "checks"]
    return chosen


def _name(chosen: argparse.Namespace) -> str:
    return "gpu" if chosen.device.startswith("cuda") else "gpu-script-on-cpu"


def _folder(chosen: argparse.Namespace) -> Path:
    folder: Path = chosen.results / f"{_name(chosen)}-parts"
    return folder


def _parts(chosen: argparse.Namespace) -> dict[str, list[str]]:
    """Each part's name, and its steps: configurations to check, or workloads to measure."""
    kind = chosen.device.partition(":")[0]
    parts: dict[str, list[str]] = {}
    if "checks" in chosen.parts:
        parts |= {f"checks-{shape}": list(CONFIGURATIONS[kind]) for shape in CHECK_SHAPES[kind]}
    if "faults" in chosen.parts and kind == "cuda":
        parts["faults"] = list(FAULTS)
    if "speed" in chosen.parts:
        parts |= {f"speed-{shape}": chosen.workloads for shape in chosen.shapes}
    return parts


def _command(name: str, chosen: argparse.Namespace, steps: Sequence[str], seconds: float) -> list[str]:
    """The command line of a part's own process."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--steps", *steps, "--seconds", str(seconds)]
    return [*command, "--device", chosen.device, "--results", str(chosen.results.resolve())]


def _merge(chosen: argparse.Namespace, about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """All parts on disk as one result, written as JSON and Markdown."""
    parts = read_parts(_folder(chosen))
    measured = [part["environment"] for part in parts.values() if "environment" in part]
    if measured:  # the parts may come from another machine
        about = {**measured[-1], "command": about["command"]}
    checks = [one for name, part in parts.items() if name.startswith("checks") for one in part["results"].values()]
    after_faults = parts.get("faults", {"results": {}})["results"]
    shapes = {
        name.removeprefix("speed-"): {
            "rows": [one["row"] for one in part["results"].values()],
            "gaps": {workload: one["gaps"] for workload, one in part["results"].items() if one["gaps"]},
            **{key: part[key] for key in FIELDS if key in part},
        }
        for name, part in parts.items()
        if name.startswith("speed")
    }
    faults = [f"{name}, {fault}" for name, part in parts.items() for fault in part["faults"]]
    faults += [f"{one['shape']}, {one['configuration']}: wrong vectors" for one in checks if one["result"] == WRONG]
    faults += [f"faults, {name}: {one}" for name, one in after_faults.items() if one["result"] == WRONG]
    data = {
        "environment": about,
        "dtype": str(_dtype(torch.device(chosen.device))).removeprefix("torch."),
        "checks": checks,
        "after_faults": after_faults,
        "shapes": shapes,
        "faults": faults,
    }
    text = _text(data)
    report.write(chosen.results, _name(chosen), data, text)
    return data, text


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# The part "checks"


def _check(part: PartFile, chosen: argparse.Namespace) -> None:
    """Distance of each configuration to the oracle, over every kind of item.

    Distance is 1 - cosine, the mean over all items. It may be 1.5 times that of transformers in the same dtype.
    """
    shape = chosen.part.partition("-")[2]
    device = torch.device(chosen.device)
    dtype = _dtype(device)
    with random_folder(shape) as folder:
        words = read_words(folder)
        items = [item for name in CHECKED for item in make_items(name, 6, words)]
        expected = Oracle(folder).embed([_oracle_item(item) for item in items])
        theirs = peers.padded_transformers(folder, peers.load_model(folder, dtype, device)).embed(items)
        allowed = 1.5 * _distance(theirs, expected) + 1e-6
        for name in chosen.steps:
            more = ROUNDING.get(CONFIGURATIONS[device.type][name].get("weights", ""), 0.0)
            part.step(name, partial(_check_one, folder, items, expected, allowed + more, name, device))
            if name in part.data["results"]:
                part.data["results"][name] |= {"shape": shape, "configuration": name}
                part.update()


def _check_one(
    folder: Path,
    items: list[dict[str, Any]],
    expected: NDArray[np.float32],
    allowed: float,
    name: str,
    device: torch.device,
) -> dict[str, Any]:
    options = CONFIGURATIONS[device.type][name]
    if reason := _missing(options):
        return {"result": reason}
    dtype = _dtype(device)
    ours = peers.ours(folder, dtype, device, **options)
    together = ours.embed(items)
    alone = np.concatenate([ours.embed([item]) for item in items])
    ours.close()
    distance, difference = _distance(together, expected), float(np.abs(together - alone).max())
    is_right = distance <= allowed and difference <= MAX_BATCH_DIFFERENCE[dtype]
    return {
        "result": RIGHT if is_right else WRONG,
        "distance": distance,
        "allowed": allowed,
        "batch_difference": difference,
    }


def _missing(options: dict[str, Any]) -> str:
    """Why this machine cannot run the configuration; empty if it can."""
    if options["attention"] == "flash_attn" and not peers.is_installed("flash_attn"):
        return library.NOT_INSTALLED
    if weight_format := options.get("weights"):
        try:
            check_weight_format(weight_format, torch.device("cuda"), torch.bfloat16)
        except ModelUnavailable as error:
            return str(error)
    return missing_for_triton() if "compiled" in options["execution"] else ""


def _distance(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((1 - (unit(vectors) * unit(expected)).sum(1)).mean())


def _oracle_item(item: dict[str, Any]) -> dict[str, Any]:
    return {"image": peers.decode(item["image"])} if "image" in item else item


# The part "faults"


def _cause_faults(part: PartFile, chosen: argparse.Namespace) -> None:
    """What the engine does if the GPU has too little memory, or fails."""
    options: dict[str, Any] = {"dtype": "bfloat16", "attention": "varlen", "execution": "eager"}

    def fill_memory(folder: Path) -> dict[str, Any]:
        with Embedder(str(folder), device=chosen.device, **options) as embedder:
            return survive_full_memory(embedder, share_of_a_batch(embedder))

    with random_folder("small") as folder:
        if "full memory" in chosen.steps:
            part.step("full memory", partial(fill_memory, folder))
        if "lost device" in chosen.steps:
            part.step("lost device", partial(notice_lost_device, folder, chosen.device, options))


# The part "speed"


def _measure(part: PartFile, chosen: argparse.Namespace) -> None:
    """The workloads of `--steps` with one shape."""
    deadline = time.monotonic() + chosen.seconds
    shape = chosen.part.partition("-")[2]
    device = torch.device(chosen.device)
    dtype = _dtype(device)
    rates = {"matrix_flop_per_s": matrix_rate(dtype, device)}
    rates["copy_bytes_per_s"] = copy_rate(device, 2**31 if device.type == "cuda" else 2**27)
    about = part.data["environment"]
    part.update(rates=rates, date=about["date"], device=about["gpu"] or about["cpu"])
    with random_folder("tiny") as folder:  # only its tokenizer and image processor are read
        contestants, weights, weight_bytes = _load(part, folder, shape, device, dtype)
        part.update(weight_gb=weight_bytes / 1e9)
        words, preprocess = read_words(folder), library.load_preprocessor(folder)
        for index, name in enumerate(tqdm(chosen.steps, desc=shape, unit="workload")):
            seconds = (deadline - time.monotonic()) / (len(chosen.steps) - index)

            measure = partial(_compare, part, name, contestants, words, max(seconds * 0.6, 1.0), device)
            part.step(name, lambda measure=measure: _row(measure(), weights, weight_bytes, preprocess, rates))
            if name in part.data["results"] and name in PROFILED and device.type == "cuda":
                _profile(part, name, contestants, words)
        ours = [peer for peer in contestants if peer.name.startswith(peers.OURS)]
        if ours and device.type == "cuda":
            part.guard("query next to bulk", lambda: part.update(next_to_bulk=_next_to_bulk(ours, words)))
        for peer in contestants:
            peer.close()


def _compare(
    part: PartFile,
    name: str,
    contestants: list[peers.Peer],
    words: list[str],
    seconds: float,
    device: torch.device,
) -> Comparison:
    """Time one workload. A contestant that fails with two items is left out; wrong vectors are recorded as faults."""
    few = make_items(name, 2, words)
    usable = [peer for peer in contestants if part.guard(f"{name}: {peer.name}", partial(peer.embed, few)) is not None]
    return compare(
        name,
        usable,
        words,
        rounds=ROUNDS,
        seconds=seconds,
        limit=partial(matrix_rate, _dtype(device), device),
        min_cosine=MIN_COSINE,
        on_wrong=part.fault,
    )


def _row(
    comparison: Comparison, weights: Weights, weight_bytes: int, preprocess: Preprocessor, rates: dict[str, float]
) -> dict[str, Any]:
    row = library.figures(comparison, weights, preprocess)
    row["copy_limit_ms"] = weight_bytes / rates["copy_bytes_per_s"] * 1e3
    return {"row": row, "gaps": {}}


def _profile(part: PartFile, name: str, contestants: list[peers.Peer], words: list[str]) -> None:
    """Add the gaps between kernels of each of our configurations to the step's result."""
    result = part.data["results"][name]
    items = make_items(name, 1 if name == "query" else result["row"]["num_items"], words)
    for peer in contestants:
        if peer.name.startswith(peers.OURS):
            found = part.guard(f"{name}: gaps of {peer.name}", partial(launch_gaps, partial(peer.embed, items)))
            result["gaps"] |= {peer.name: found} if found else {}
            part.update()


def _next_to_bulk(ours: list[peers.Peer], words: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of a query while another thread embeds texts of 64 tokens, for each of our configurations."""
    bulk, queries = make_items("text-64", 4096, words), make_items("query", NUM_NEXT_TO_BULK, words)
    found = {}
    for peer in ours:
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(peer.embed, bulk)
            seconds = []
            for query in queries:
                if running.done():
                    running.result()
                    running = thread.submit(peer.embed, bulk)
                start = time.perf_counter()
                peer.embed([query])
                seconds.append(time.perf_counter() - start)
        p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1e3
        found[peer.name] = {"p50_ms": float(p50), "p99_ms": float(p99)}
    return found


def _load(
    part: PartFile, folder: Path, shape: str, device: torch.device, dtype: torch.dtype
) -> tuple[list[peers.Peer], Weights, int]:
    """The engine in each configuration, and its peers, which have a copy of the weights of their own."""
    theirs = _make_transformers(shape, device, dtype)
    model = _copy(theirs)
    makers: dict[str, Callable[[], peers.Peer]] = {
        name: partial(_make_ours, name, folder, dtype, device, model, options)
        for name, options in CONFIGURATIONS[device.type].items()
        if not _missing(options) and "weights" not in options  # the model is given, in 16 bits
    }
    makers[peers.TRANSFORMERS] = partial(peers.padded_transformers, folder, theirs)
    if peers.is_installed("sentence_transformers"):
        makers[peers.SENTENCE_TRANSFORMERS] = partial(peers.sentence_transformers, folder, dtype, device, theirs)
    contestants = []
    loading_s: dict[str, float] = {}
    for name, make in makers.items():
        start = time.monotonic()
        peer = part.guard(f"loading {name}", make)
        if peer is not None:
            contestants.append(peer)
            loading_s[peer.name] = round(time.monotonic() - start, 1)
            part.update(loading_s=loading_s)
    weights = Weights.of(theirs)
    return contestants, weights, weights.per_token * theirs.dtype.itemsize


def _make_ours(
    name: str, folder: Path, dtype: torch.dtype, device: torch.device, model: Any, options: dict[str, Any]
) -> peers.Peer:
    """The engine in the configuration `name`. The first one is the reference of the others' vectors: `peers.OURS`."""
    is_first = name == next(iter(CONFIGURATIONS[device.type]))
    peer = peers.ours(folder, dtype, device, model, **options)
    return replace(peer, name=peers.OURS if is_first else f"{peers.OURS}, {name}")


def _make_transformers(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Qwen3VLModel with random weights like those of `random_checkpoint`, made on the device."""
    config = shape_config(shape, tokenizer())
    with torch.device(device):
        model = Qwen3VLModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(0)
    std = config.get_text_config().initializer_range
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.0, std, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data += 1
    return model.eval().requires_grad_(False)


def _copy(model: Any) -> Towers:
    """The engine's own modules with copies of the weights of transformers' Qwen3VLModel."""
    with torch.device("meta"):
        towers = Towers(Architecture.model_validate_json(model.config.to_json_string(use_diff=False)))
    towers.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    return towers.eval().requires_grad_(False)


# The report


def _bars(shape: dict[str, Any]) -> report.Bars:
    return library.bars(shape["rows"])


def _text(data: dict[str, Any]) -> str:
    parts = [
        report.table(
            ("shape", "configuration", "result", "1 - cosine to the oracle", "allowed", "difference in a batch"),
            [[one["shape"], one["configuration"], one["result"], *_shown(one)] for one in data["checks"]],
        )
    ]
    parts += [f"After a fault, {name}: {one['result']}." for name, one in data["after_faults"].items()]
    for shape, one in data["shapes"].items():
        if "rates" in one:
            matrix, copy = (one["rates"][name] / 1e12 for name in ("matrix_flop_per_s", "copy_bytes_per_s"))
            parts.append(
                f"{shape}, {one['device']}, {data['dtype']}: matrix product {matrix:.3g} TFLOP/s, copy {copy:.3g} TB/s."
            )
        parts.append(library.table(one["rows"]))
        gaps = [[name, who, *gap.values()] for name, found in one["gaps"].items() for who, gap in found.items()]
        if gaps:
            parts.append(report.table(_GAP_HEADERS, gaps))
        for row in one["rows"]:
            if row["workload"] == "query":
                p50 = {who: statistics.median(found["seconds"]) * 1e3 for who, found in row["who"].items()}
                fastest = min(p50, key=lambda who: (not who.startswith(peers.OURS), p50[who]))
                parts.append(
                    f"One query: {p50[fastest]:.2f} ms ({fastest}); reading its weights once takes "
                    f"{row['copy_limit_ms']:.2f} ms."
                )
        for who, ms in one.get("next_to_bulk", {}).items():
            parts.append(f"One query next to bulk: {ms['p50_ms']:.1f} ms, p99 {ms['p99_ms']:.1f} ms ({who}).")
    parts += ["Faults:", *(f"- {fault}" for fault in data["faults"])] if data["faults"] else ["No faults."]
    return "\n\n".join(parts)


def _shown(check: dict[str, Any]) -> list[str]:
    return [f"{check[key]:.1e}" if key in check else "" for key in ("distance", "allowed", "batch_difference")]


_GAP_HEADERS = ("workload", "one call of", "kernels", "span ms", "GPU busy", "gaps over 10 us", "longest gap us")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the running part is ended too
    sys.exit(1 if main()["faults"] else 0)
