"""What one forward pass sends to a GPU, counted without one: `python -m benchmarks.gpu_counts [--shapes 2b 8b]`.

Kernels, host-to-device copies, FLOPs and the roofline's time on an H200, for one query of 16 tokens (eager, and as a
CUDA graph) and for full batches of texts and of images; each with eager and with compiled layers, whose kernels are
those of Inductor (`benchmarks.compiled_layers`). Graphs of compiled layers are the default on a GPU. With weights in 16
bits, and with those of `--weights`. Writes `results/gpu_counts.json`; a test fails if a change adds kernels or copies.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import report
from benchmarks.checkpoints import random_folder
from benchmarks.fake_cuda import PRODUCTS, FakeCuda, KernelCounter, fake_cuda, missing_requirement
from benchmarks.workloads import make_items, read_words
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model import cuda_graphs
from embedder.model.cuda_graphs import graph_size
from embedder.model.forward import Forward
from embedder.model.packing import pack
from embedder.model.pooling import pool
from embedder.model.weights import visual_cost
from embedder.settings import Settings, WeightFormat

WORKLOADS = ("query", "text-64", "image-448")
FILE = "gpu_counts"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Count what a forward pass sends to a GPU; no GPU is needed.")
    parser.add_argument("--shapes", nargs="+", choices=("2b", "8b"), default=["2b", "8b"])
    parser.add_argument("--weights", nargs="*", choices=("int8", "fp8"), default=["int8", "fp8"])
    parser.add_argument("--batch-tokens", type=int, default=Settings().max_batch_tokens, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    if reason := missing_requirement():
        raise SystemExit(reason)
    data = {
        "command": report.command(FILE, chosen),
        "torch": torch.__version__.partition("+")[0],
        "shapes": {shape: count_shape(shape, batch_tokens=chosen.batch_tokens) for shape in chosen.shapes},
        "weights": {
            weights: {shape: count_shape(shape, weights, chosen.batch_tokens) for shape in chosen.shapes}
            for weights in chosen.weights
        },
    }
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / f"{FILE}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(table(all_counts(data)))
    return data


def all_counts(data: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The counts of a record by shape, and by shape and format of the weights where these have 8 bits."""
    found: dict[str, dict[str, dict[str, float]]] = dict(data["shapes"])
    for weights, shapes in data["weights"].items():
        found |= {f"{shape}, {weights}": counts for shape, counts in shapes.items()}
    return found


def table(shapes: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown."""
    headers = (
        "shape",
        "batch",
        "items",
        "kernels",
        "products",
        "copies to the GPU",
        "TFLOP",
        "roofline, ms on an H200",
    )
    rows = [
        [
            *(shape, name, one["items"], one["kernels"], one["products"], one["host_to_device_copies"]),
            *(report.number(one["tflop"]), report.number(one["roofline_ms"])),
        ]
        for shape, batches in shapes.items()
        for name, one in batches.items()
    ]
    return report.table(headers, rows)


def count_shape(
    shape: str, weights: WeightFormat | None = None, batch_tokens: int = Settings().max_batch_tokens
) -> dict[str, dict[str, float]]:
    """The counts of each batch, after a first one that has filled the prefix cache."""
    import benchmarks.compiled_layers  # noqa: F401 - imports torch's compiler, which the fake device would disturb

    with random_folder("tiny") as folder:  # its tokenizer and image processor
        settings = Settings()
        words, vision = read_words(folder), read_vision_config(folder, settings)
        tokenizer = load_tokenizer(folder)
    counts = {}
    with fake_cuda() as device:
        model = device.make_model(shape, weight_format=weights)
        preprocess = Preprocessor(tokenizer, vision, settings, visual_cost=visual_cost(model))
        for layers in ("", ", compiled"):
            forward = device.make_forward(model, preprocess.vision, "varlen", is_compiled=bool(layers))
            for name in WORKLOADS:
                inputs = _full_batch(name, words, preprocess, batch_tokens)

                def run(inputs: list[ModelInput] = inputs, forward: Forward = forward) -> None:
                    pool(forward(pack(inputs, preprocess.vision.merge_size, forward.device)))

                run()
                counts[name + layers] = _figures(inputs, device.count(run))
                if name == "query":
                    counts[f"query, CUDA graph{layers}"] = _figures(inputs, *_count_graph(device, forward, inputs))
    return counts


def _full_batch(name: str, words: list[str], preprocess: Preprocessor, max_cost: int) -> list[ModelInput]:
    """As many items as a batch holds, sorted by length as the engine sorts them."""
    preprocess_once = cache(lambda kind, content: preprocess(item_from_fields({kind: content})))
    batch: list[ModelInput] = []
    cost = 0
    for item in make_items(name, 1 if name == "query" else max_cost // 64, words):
        ((kind, content),) = item.items()
        one = preprocess_once(kind, content)
        cost += one.cost
        if cost > max_cost:
            break
        batch.append(one)
    return sorted(batch, key=lambda one: one.num_tokens)


def _count_graph(device: FakeCuda, forward: Forward, inputs: list[ModelInput]) -> tuple[KernelCounter, KernelCounter]:
    """What a replay launches itself, and the kernels of the graph."""
    size = graph_size(inputs)
    assert size is not None
    with mock.patch.object(cuda_graphs, "SIZES", (size,)):
        graphs = cuda_graphs.TextGraphs(forward.language, forward.device)
    outside = device.count(lambda: pool(graphs(inputs, size)))
    with torch.inference_mode():
        inside = device.count(lambda: forward.language(graphs._graphs[size].batch, None, []))
    return outside, inside


def _figures(inputs: list[ModelInput], *counters: KernelCounter) -> dict[str, float]:
    faults = [fault for counter in counters for fault in counter.faults]
    assert not faults, faults
    return {
        "items": len(inputs),
        "kernels": sum(counter.num_kernels for counter in counters),
        "products": sum(counter.kernels[name] for counter in counters for name in PRODUCTS),
        "host_to_device_copies": sum(counter.host_to_device for counter in counters),
        "tflop": round(sum(counter.flops for counter in counters) / 1e12, 4),
        "roofline_ms": round(sum(counter.roofline_ms for counter in counters), 3),
    }


if __name__ == "__main__":
    main()
