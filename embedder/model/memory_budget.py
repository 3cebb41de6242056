"""The largest batch that fits the device's memory, found by running batches at start-up.

A run is exact where an estimate is not: an estimate would need every tensor that is alive at the same time, and what
other programs hold on the device. Texts and images are both tried, because each tower has its own peak.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import PIL.Image

from embedder.errors import DeviceOutOfMemory, ModelUnavailable
from embedder.inputs.items import EmbeddingItem, Image, Part, Text
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.prompt import PROMPT_TOKENS
from embedder.settings import Settings

logger = logging.getLogger(__name__)

MIN_BATCH_TOKENS = 64  # the least that the setting `max_batch_tokens` allows


def find_budget(preprocess: Preprocessor, run: Callable[[list[ModelInput]], object]) -> int:
    """The largest of `max_batch_tokens`, a half of it, a quarter, ... for which `run` embeds both test batches.

    `run` raises `DeviceOutOfMemory` for a batch that does not fit. Raises `ModelUnavailable` if not even
    `MIN_BATCH_TOKENS` fit.
    """
    settings = preprocess.settings
    budget = settings.max_batch_tokens
    while budget >= MIN_BATCH_TOKENS:
        try:
            for inputs in _test_batches(preprocess, budget):
                run(inputs)
        except DeviceOutOfMemory:
            budget //= 2
        else:
            _warn_if_reduced(budget, settings)
            return budget
    raise ModelUnavailable(
        f"the weights fit the device's memory, but not a batch of {MIN_BATCH_TOKENS} tokens in addition. "
        "Use a device with more memory, or serve a smaller checkpoint"
    )


def _test_batches(preprocess: Preprocessor, num_tokens: int) -> Iterator[list[ModelInput]]:
    """Two batches of about `num_tokens` tokens: the longest texts, then the largest images, that the settings allow."""
    max_tokens = min(num_tokens, preprocess.settings.max_input_tokens) - PROMPT_TOKENS
    num_visual = max(1, int(max_tokens / (1 + preprocess.visual_cost)))
    side = math.isqrt(min(preprocess.vision.regime.max_pixels, num_visual * preprocess.vision.factor**2))
    parts: tuple[Part, ...] = (Text(" a" * max_tokens), Image(PIL.Image.new("RGB", (side, side))))
    for part in parts:
        item = preprocess(EmbeddingItem((part,)))
        yield [item] * max(1, num_tokens // item.cost)


def _warn_if_reduced(budget: int, settings: Settings) -> None:
    if budget < settings.max_batch_tokens:
        logger.warning(
            "batches have at most %d tokens, not %d (EMBEDDER_MAX_BATCH_TOKENS): larger ones do not fit the device's "
            "memory",
            budget,
            settings.max_batch_tokens,
        )
    if budget < settings.max_input_tokens:
        logger.warning(
            "an item of more than %d tokens may not fit the device's memory; lower EMBEDDER_MAX_INPUT_TOKENS to that",
            budget,
        )
