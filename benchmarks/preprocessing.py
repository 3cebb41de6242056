"""Measure JPEG preprocessing on one core: `python -m benchmarks.preprocessing`.

Measures the preprocessing from base64 to model input in one thread, in turns with Pillow, which decodes the same
images, or decodes and resizes them to the same size. It also computes how many 448x448 images per second one GPU embeds
at the goal (half of an H200's matrix rate), and how many cores preprocess them.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.checkpoints import random_folder, tokenizer
from benchmarks.library import load_preprocessor
from benchmarks.limits import Weights
from benchmarks.random_checkpoint import shape_config
from benchmarks.workloads import make_items
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from transformers import Qwen3VLModel  # noqa: E402 - after the declaration

SIZES = ("image-256", "image-448", "image-1024x1280")
DECODE, RESIZE, OURS = "Pillow: decode", "Pillow: decode and resize", "ours: base64 to model input"
NUM_PICTURES = 16
GOAL_SIZE, GOAL_SHARE, GOAL_CORES = "image-448", 0.5, 16
H200_TFLOPS = 790.0  # bfloat16, a large matrix product


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Images per second and core, compared with Pillow.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tflops", type=float, default=H200_TFLOPS, help="matrix rate of the GPU")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command("preprocessing", chosen))
    with random_folder("tiny") as folder:
        preprocess = load_preprocessor(folder)
    rates = {size: _rates(size, preprocess, chosen.rounds) for size in tqdm(SIZES, desc="sizes", unit="size")}
    (item,) = make_items(GOAL_SIZE, 1, [])
    wanted = {shape: _wanted(shape, preprocess(item_from_fields(item)), chosen.tflops) for shape in ("2b", "8b")}
    per_core = rates[GOAL_SIZE][OURS]
    cores = {shape: images_per_s / per_core for shape, images_per_s in wanted.items()}
    data = {"environment": about, "images_per_s": rates, "gpu_images_per_s": wanted, "cores": cores}
    text = _table(rates) + "\n\n" + _verdict(wanted, cores, chosen.tflops)
    report.save(chosen.results, "preprocessing", data, text, rates, "pictures per second and core")
    print(text)
    return data


def _rates(size: str, preprocess: Preprocessor, rounds: int) -> dict[str, float]:
    """Images per second, medians over the rounds."""
    pictures = [item["image"] for item in make_items(size, NUM_PICTURES, [])]
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    sides = [_side(preprocess(item_from_fields({"image": text})), preprocess) for text in texts]

    def decode() -> None:
        for picture in pictures:
            PIL.Image.open(io.BytesIO(picture)).convert("RGB")

    def resize() -> None:
        for picture, side in zip(pictures, sides, strict=True):
            PIL.Image.open(io.BytesIO(picture)).convert("RGB").resize(side, PIL.Image.Resampling.BICUBIC)

    def ours() -> None:
        for text in texts:
            preprocess(item_from_fields({"image": text}))

    runs: dict[str, Callable[[], None]] = {DECODE: decode, RESIZE: resize, OURS: ours}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: NUM_PICTURES / statistics.median(times) for name, times in seconds.items()}


def _side(model_input: ModelInput, preprocess: Preprocessor) -> tuple[int, int]:
    """The width and height to which the image is resized."""
    _, height, width = model_input.patches[0].grid_thw
    return width * preprocess.vision.patch_size, height * preprocess.vision.patch_size


def _wanted(shape: str, model_input: ModelInput, tflops: float) -> float:
    """Images per second that a GPU embeds at the goal."""
    with torch.device("meta"):
        weights = Weights.of(Qwen3VLModel(shape_config(shape, tokenizer())))
    return GOAL_SHARE * tflops * 1e12 / weights.flops([model_input])


def _table(rates: dict[str, dict[str, float]]) -> str:
    rows = [
        [size, *(report.number(one[name]) for name in (DECODE, RESIZE, OURS)), f"{one[OURS] / one[RESIZE]:.0%}"]
        for size, one in rates.items()
    ]
    return report.table(("pictures/s on one core", DECODE, RESIZE, OURS, "ours / decode and resize"), rows)


def _verdict(wanted: dict[str, float], cores: dict[str, float], tflops: float) -> str:
    rows = [
        [shape, report.number(wanted[shape]), report.number(cores[shape]), "yes" if cores[shape] < GOAL_CORES else "NO"]
        for shape in wanted
    ]
    gpu = f"{GOAL_SIZE} pictures/s at {GOAL_SHARE:.0%} of {tflops:g} TFLOP/s"
    return report.table(("shape", gpu, "cores that feed it", f"{GOAL_CORES} cores are enough"), rows)


if __name__ == "__main__":
    main()
