"""What each part of a model loses if its weights are rounded to 8 bits.

The choice of the weights that keep 16 bits rests on these figures (`embedder.model.eight_bit`). `python -m
benchmarks.weights --parts sensitivities` records them, with random weights of seed 0 in a shape that has all layers of
the 2B and a quarter of its width. The part `depth`, which gives the verdict, uses the shape itself and other seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.checkpoints import tokenizer
from benchmarks.invariance import picture
from benchmarks.library import load_preprocessor
from benchmarks.random_checkpoint import shape_config, write_checkpoint
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.model.forward import Forward
from embedder.model.packing import pack
from embedder.model.pooling import pool
from embedder.model.products import join_layers
from embedder.model.weights import load_model

SEED = 0
ITEMS: list[dict[str, Any]] = [
    {"text": "red green blue " * 7},
    {"text": "a bee on a flower", "instruction": QUERY_INSTRUCTION},
    {"image": picture(64, 64, 0)},
    {"image": picture(100, 200, 4), "text": "what the picture shows"},
]
WHOLE_ROW = 0
NARROW: dict[str, dict[str, Any]] = {  # the weights of a narrower layer are larger, so that its outputs are as large
    "text": {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "initializer_range": 0.04,
    },
    "vision": {"hidden_size": 256, "num_heads": 4, "intermediate_size": 1024, "initializer_range": 0.04},
}
# One scale for each row and, to see what more scales gain, for each so many inputs.
GROUP_SIZES = {"row": WHOLE_ROW, "32 inputs": 32}


def write_narrow(folder: Path, shape: str) -> None:
    """A checkpoint with as many layers as `shape`, a quarter of its width if it is the 2B's, and a small vocabulary."""
    narrow = NARROW if shape == "2b" else {"text": {}, "vision": {}}
    text = {**narrow["text"], "vocab_size": len(tokenizer())}
    config = shape_config(shape, tokenizer(), text=text, vision=narrow["vision"])
    write_checkpoint(folder, config, tokenizer(), seed=SEED, dtype="bfloat16")


def measure_sensitivities(folder: Path) -> dict[str, dict[str, float]]:
    """1 - the mean cosine to the vectors of the whole model in bfloat16, by rounded part and kind of scale."""
    model: Any = load_model(folder, torch.bfloat16, torch.device("cpu"))
    preprocess = load_preprocessor(folder)
    inputs = [preprocess(item_from_fields(fields)) for fields in ITEMS]
    join_layers(model.language_model.layers)
    exact = _vectors(model, preprocess, inputs)
    rows: dict[str, dict[str, float]] = {}
    for name, modules in tqdm(model_parts(model).items(), desc="sensitivities", unit="part"):
        rows[name] = {"weights": sum(one.weight.numel() for one in modules)}
        for scales, size in GROUP_SIZES.items():
            with rounded(modules, size):
                cosines = (_vectors(model, preprocess, inputs) * exact).sum(1)
            rows[name][scales] = float(1 - cosines.mean())
    return rows


def model_parts(model: Any) -> dict[str, list[nn.Module]]:
    """Modules with a weight, by the name of the part. Layers in groups, of which each is twice the one before it."""
    layers = model.language_model.layers
    ends = [0, *(2**power for power in range(math.ceil(math.log2(len(layers))))), len(layers)]
    parts = {"token embeddings": [model.language_model.embed_tokens]}
    for start, end in itertools.pairwise(ends):
        name = f"layer {start}" if end == start + 1 else f"layers {start} to {end - 1}"
        parts[name] = [one for layer in layers[start:end] for one in _linears(layer)]
    visual = model.visual
    parts["vision blocks"] = _linears(visual.blocks)
    parts["vision mergers"] = [*_linears(visual.merger), *_linears(visual.deepstack_merger_list)]
    return parts


def _linears(module: nn.Module) -> list[nn.Module]:
    return [one for one in module.modules() if isinstance(one, nn.Linear)]


@contextmanager
def rounded(modules: list[nn.Module], group_size: int) -> Iterator[None]:
    """The weights of `modules` rounded to 8 bits, with a scale for each `group_size` inputs, or for each row."""
    kept = [module.weight for module in modules]
    for module in modules:
        module.weight = nn.Parameter(round_weight(module.weight, group_size), requires_grad=False)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module, weight in zip(modules, kept, strict=True):
            module.weight = weight


def round_weight(weight: Tensor, group_size: int) -> Tensor:
    """The nearest multiples of 1/127 of the largest value of each group."""
    rounded = torch.empty_like(weight)
    for rows, target in zip(weight.split(4096), rounded.split(4096), strict=True):
        groups = rows.float().view(len(rows), -1, group_size or weight.shape[1])
        scale = (groups.abs().amax(2, keepdim=True) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        target.copy_(((groups / scale).round_() * scale).view_as(rows))
    return rounded


def _vectors(model: Any, preprocess: Preprocessor, inputs: list[ModelInput]) -> NDArray[np.float32]:
    forward = Forward(model, preprocess.vision, "sdpa")
    rows = [
        pool(forward(pack([one.without_prefix()], preprocess.vision.merge_size, forward.device)))() for one in inputs
    ]
    vectors: NDArray[np.float32] = np.concatenate(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
