"""The FLOPs of items are those that torch counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from benchmarks.checkpoints import random_folder
from benchmarks.library import load_preprocessor
from benchmarks.limits import Weights
from embedder.inputs.items import EmbeddingItem, Image, Text
from tests.conftest import picture, words

PRODUCTS, ATTENTION = ("mm", "addmm"), ("bmm",)


def counted(run: Callable[[], object], operations: tuple[str, ...]) -> int:
    """FLOPs of these operations, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(
        flops for operation, flops in counts.items() if operation._qualified_op_name.split("::")[1] in operations
    )


@pytest.mark.slow
def test_flops_are_those_that_torch_counts() -> None:
    with random_folder("tiny") as folder:
        model = peers.load_model(folder, torch.float32, torch.device("cpu"))
        preprocess = load_preprocessor(folder)
    model.set_attn_implementation("eager")  # which computes the pairs that a causal mask hides too
    weights = Weights.of(model)
    text, image = (
        preprocess(EmbeddingItem((Text(words(300, 0)),))),
        preprocess(EmbeddingItem((Image(picture(448, 448)),))),
    )
    ids = torch.from_numpy(text.input_ids)[None]
    (patches,) = image.patches
    pixels = torch.zeros(len(patches.pixels), 2 * patches.pixels.shape[1])  # theirs has two equal frames
    grid = torch.tensor([patches.grid_thw])

    def language() -> object:
        return model.language_model(input_ids=ids)

    def vision() -> object:
        return model.visual(pixels, grid)

    assert counted(language, PRODUCTS) == pytest.approx(weights.flops([text]), rel=0.01)
    hidden_share = (text.num_tokens - 1) / (2 * text.num_tokens)
    assert counted(language, ATTENTION) * (1 - hidden_share) == pytest.approx(weights.attention_flops([text]), rel=0.01)
    assert counted(vision, ATTENTION) == pytest.approx(replace(weights, per_pair=0).attention_flops([image]), rel=0.01)
