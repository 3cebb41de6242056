"""How many tokens fit the device at once: found by trying, before anybody waits for an answer.

An estimate would have to know every tensor that lives at the same time, and what else is on the device; a batch that
went through is right by itself. It is tried with texts and with pictures, whose towers need memory each in its way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import PIL.Image

from embedder.errors import DeviceOutOfMemory, ModelUnavailable
from embedder.inputs.items import EmbeddingItem, Image, Part, Text
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.settings import Settings

logger = logging.getLogger(__name__)

LEAST_BUDGET = 64  # what `max_batch_tokens` may be
PROMPT_TOKENS = 40  # about what the chat template and the instruction take of an item


def find_budget(preprocess: Preprocessor, run: Callable[[list[ModelInput]], object]) -> int:
    """The largest of `max_batch_tokens`, its half, its quarter, ... of which `run` can embed a batch of either kind.

    `run` raises `DeviceOutOfMemory`. Raises `ModelUnavailable` where not even a short item fits.
    """
    settings = preprocess.settings
    budget = settings.max_batch_tokens
    while budget >= LEAST_BUDGET:
        try:
            for inputs in _batches(preprocess, budget):
                run(inputs)
        except DeviceOutOfMemory:
            budget //= 2
        else:
            _tell(budget, settings)
            return budget
    raise ModelUnavailable("the device's memory holds the weights, but not a batch of 64 tokens beside them")


def _batches(preprocess: Preprocessor, num_tokens: int) -> Iterator[list[ModelInput]]:
    """About so many tokens of the longest texts, then of the largest pictures, that the settings allow."""
    own = min(num_tokens, preprocess.settings.max_input_tokens) - PROMPT_TOKENS
    num_visual = max(1, int(own / (1 + preprocess.visual_cost)))
    side = math.isqrt(min(preprocess.vision.max_pixels, num_visual * preprocess.vision.factor**2))
    parts: tuple[Part, ...] = (Text(" a" * own), Image(PIL.Image.new("RGB", (side, side))))
    for part in parts:
        one = preprocess(EmbeddingItem((part,)))
        yield [one] * max(1, num_tokens // one.cost)


def _tell(budget: int, settings: Settings) -> None:
    if budget < settings.max_batch_tokens:
        logger.warning(
            "batches have at most %d tokens, not %d: more do not fit the device's memory",
            budget,
            settings.max_batch_tokens,
        )
    if budget < settings.max_input_tokens:
        logger.warning("longer items than %d tokens may not fit either; lower EMBEDDER_MAX_INPUT_TOKENS", budget)
