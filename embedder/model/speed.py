"""How long the largest items take on a CPU, estimated at start from a few measured layers and the model's shapes.

Small inputs say little about large ones, because most of their time is spent on reading the weights. So two layers of
each tower run with inputs of medium size, and attention by itself with a longer sequence. Their times are scaled by the
number of floating-point operations. Those of attention, half of a large picture's, take longer than those of products,
above all in bfloat16. Time in which other programs use the cores is not counted, so the estimate is for an idle machine
even if this one is busy.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import PIL.Image
import torch

from embedder.errors import ITEM_ERRORS
from embedder.inputs.items import EmbeddingItem, Image, Text
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.prompt import PROMPT_TOKENS
from embedder.model.forward import Forward
from embedder.model.packing import Run, Sequences, pack
from embedder.settings import Settings

logger = logging.getLogger(__name__)

MEASURED_SIDE = 448  # pixels: 784 patches
MEASURED_WORDS = 250
MEASURED_SEQUENCE = 4096  # tokens of attention by itself, with one head: nearly as many as a large picture's
NUM_MEASURED = 2  # layers of each tower, after one that allocates the memory
MARGIN = 1.5  # of the timeout that the warning proposes


class _Measured(Exception):
    """Ends a forward pass after the measured layers."""


@dataclass(frozen=True)
class _Clocks:
    """The time, and the CPU time of all threads of this process, in seconds."""

    elapsed: float
    cpu: float

    @classmethod
    def read(cls) -> Self:
        return cls(time.perf_counter(), time.process_time())

    def seconds_since(self, start: _Clocks) -> float:
        """Seconds that the work since `start` takes on an idle machine.

        On a busy one, the threads of a layer wait for cores, and time passes without CPU time. Where other threads of
        this process compute too, CPU time says more than the time that has passed, which then counts.
        """
        return min(self.elapsed - start.elapsed, (self.cpu - start.cpu) / torch.get_num_threads())


class Flops(NamedTuple):
    """Floating-point operations of one layer, or of its parts per second."""

    products: float
    attention: float


@dataclass(frozen=True)
class Speed:
    """What the layers of each tower compute per second."""

    forward: Forward
    vision: Flops
    language: Flops

    def seconds(self, num_patches: int, num_tokens: int) -> float:
        """The time of one item with an image of `num_patches` (0: none), by itself in a batch."""
        seen = len(self.forward.vision.tower.blocks) * _seconds(vision_flops(self.forward, num_patches), self.vision)
        read = len(self.forward.language.tower.layers) * _seconds(
            language_flops(self.forward, num_tokens), self.language
        )
        return seen + read


def _seconds(flops: Flops, per_second: Flops) -> float:
    return flops.products / per_second.products + flops.attention / per_second.attention


def warn_if_slow(forward: Forward, preprocess: Preprocessor) -> None:
    """Log how long the largest picture and the longest text take, with a warning if that exceeds the timeout."""
    speed = measure_speed(forward, preprocess)
    if speed is None:
        return
    settings, vision = preprocess.settings, preprocess.vision
    num_patches = vision.regime.max_pixels // vision.patch_size**2
    num_tokens = min(settings.max_input_tokens, num_patches // vision.merge_size**2 + PROMPT_TOKENS)
    picture_s = speed.seconds(num_patches, num_tokens)
    text_s = speed.seconds(0, settings.max_input_tokens)
    logger.info(
        "estimated for this CPU: %s for a picture of %d pixels, %s for a text of %d tokens",
        _shown(picture_s),
        vision.regime.max_pixels,
        _shown(text_s),
        settings.max_input_tokens,
    )
    if picture_s > settings.request_timeout_s:
        pixels = int(vision.regime.max_pixels * settings.request_timeout_s / picture_s / MARGIN) // 1024 * 1024
        _warn("picture", picture_s, settings, f"EMBEDDER_MAX_PIXELS={max(4096, pixels)}")
    if text_s > settings.request_timeout_s:
        tokens = int(settings.max_input_tokens * settings.request_timeout_s / text_s / MARGIN)
        _warn("text", text_s, settings, f"EMBEDDER_MAX_INPUT_TOKENS={max(64, tokens)}")


def measure_speed(forward: Forward, preprocess: Preprocessor) -> Speed | None:
    """Run some layers of each tower.

    None if a tower has too few to measure, or if the limits allow only smaller items: then no item takes long.
    """
    num_blocks, num_layers = len(forward.vision.tower.blocks), len(forward.language.tower.layers) - 1
    if min(num_blocks, num_layers) < NUM_MEASURED + 2:
        return None
    try:
        picture = preprocess(EmbeddingItem((Image(PIL.Image.new("RGB", (MEASURED_SIDE, MEASURED_SIDE))),)))
        text = preprocess(EmbeddingItem((Text(" a" * MEASURED_WORDS),)))
    except ITEM_ERRORS:
        return None
    num_patches = sum(math.prod(patches.grid_thw) for patches in picture.patches)
    layer_s = partial(_layer_seconds, forward, merge_size=preprocess.vision.merge_size)
    vision, language = forward.vision.tower.config, forward.language.tower.config
    flops = vision_flops(forward, num_patches), language_flops(forward, text.num_tokens)
    return Speed(
        forward,
        _speed_of(forward, flops[0], layer_s(picture), vision.hidden_size // vision.num_heads),
        _speed_of(forward, flops[1], layer_s(text), language.head_dim),
    )


def vision_flops(forward: Forward, num_patches: int) -> Flops:
    """Floating-point operations of one block for an image: two for each weight and row, and those of the attention."""
    config = forward.vision.tower.config
    num_weights: int = config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    return Flops(2.0 * num_weights * num_patches, 4.0 * int(config.hidden_size) * num_patches**2)


def language_flops(forward: Forward, num_tokens: int) -> Flops:
    """The same of one layer for a sequence. Causal attention needs half of the pairs."""
    config = forward.language.tower.config
    query_size: int = config.num_attention_heads * config.head_dim
    key_size: int = config.num_key_value_heads * config.head_dim
    num_weights: int = config.hidden_size * (2 * query_size + 2 * key_size + 3 * config.intermediate_size)
    return Flops(2.0 * num_weights * num_tokens, 2.0 * query_size * num_tokens**2)


def _speed_of(forward: Forward, flops: Flops, seconds: float, head_dim: int) -> Flops:
    """Of a tower whose layer with these operations takes so many seconds."""
    attention = 4.0 * head_dim * MEASURED_SEQUENCE**2 / _attention_seconds(forward, head_dim)
    products_s = max(seconds - flops.attention / attention, seconds / 2)  # most of a layer of medium size
    return Flops(flops.products / products_s, attention)


@torch.inference_mode()
def _attention_seconds(forward: Forward, head_dim: int) -> float:
    """The shortest time of attention by itself, in which each token attends to all."""
    states = torch.ones(MEASURED_SEQUENCE, 1, head_dim, dtype=forward.dtype, device=forward.device)
    ends = torch.tensor((0, MEASURED_SEQUENCE), dtype=torch.int32, device=forward.device)
    sequence = Sequences(ends, MEASURED_SEQUENCE, (Run(0, 1, MEASURED_SEQUENCE),))
    starts = [_Clocks.read()]
    for _ in range(NUM_MEASURED):
        forward.vision.attention(states, states, states, sequence, sequence, causal=False)
        starts.append(_Clocks.read())
    return _shortest(starts)


def _shortest(starts: Sequence[_Clocks]) -> float:
    """The shortest time from one of them to the next, in seconds."""
    return min(end.seconds_since(start) for start, end in itertools.pairwise(starts))


def _layer_seconds(forward: Forward, one: ModelInput, merge_size: int) -> float:
    """The shortest time of a measured layer of the tower that takes this item first."""
    starts: list[_Clocks] = []

    def stop() -> None:
        starts.append(_Clocks.read())
        if len(starts) == NUM_MEASURED + 2:
            raise _Measured

    batch = pack([one.without_prefix()], merge_size, forward.device)
    forward.call_between_layers(stop)
    try:
        forward(batch)
    except _Measured:
        return _shortest(starts[1:])
    finally:
        forward.call_between_layers(lambda: None)
    raise AssertionError("a tower has fewer layers than measured")


def _warn(kind: str, seconds: float, settings: Settings, other: str) -> None:
    proposed_s = math.ceil(seconds * MARGIN / 10) * 10
    logger.warning(
        "the largest %s takes about %s on this CPU, longer than the timeout of %g s, and gets 504. "
        "Set EMBEDDER_REQUEST_TIMEOUT_S=%d or %s, or use a CPU with more cores, AVX512-BF16 or AMX",
        kind,
        _shown(seconds),
        settings.request_timeout_s,
        proposed_s,
        other,
    )


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
