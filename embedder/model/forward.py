"""PackedBatch to the final hidden state of each item's last token: the vision tower, then the language tower."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from embedder.inputs.processor_config import VisionConfig
from embedder.model.attention import choose_attention
from embedder.model.language import Language, PrefixStates
from embedder.model.modules import Towers
from embedder.model.packing import MAX_SHARED_TOKENS, PackedBatch, PackedVision, pack_prefixes
from embedder.model.vision import Vision
from embedder.model.vision_cache import VisionCache


class Forward:
    """The forward pass of a loaded checkpoint on its device.

    `attention` is a setting's value: auto, flash_attn, varlen, onednn or sdpa. With `is_compiled` the layers go through
    torch.compile at their first call. `max_shared_tokens`: limit on the prefixes that a batch shares, for `pack`.
    """

    def __init__(
        self,
        model: Towers,
        vision: VisionConfig,
        attention: str,
        *,
        is_compiled: bool = False,
        max_shared_tokens: int = MAX_SHARED_TOKENS,
    ) -> None:
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.hidden_size: int = model.config.text_config.hidden_size
        self.attention_name, back_end = choose_attention(attention, self.device, self.dtype)
        self.vision = Vision(model.visual, vision, back_end, is_compiled=is_compiled)
        self.language = Language(
            model.language_model, back_end, is_compiled=is_compiled, max_shared_tokens=max_shared_tokens
        )
        self.vision_cache = VisionCache(0)  # replaced if the model has one
        self._merge_size = vision.merge_size

    def call_between_layers(self, function: Callable[[], None]) -> None:
        """Call `function` before each layer of both towers. What it raises ends the forward pass."""
        self.vision.between_layers = self.language.between_layers = function

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, prefixes: PrefixStates | None = None) -> Tensor:
        """(num_items, hidden_size) in the weights' dtype, after the final norm.

        `prefixes`: those of the batch, as `prefixes` gives them. With them, several threads may call this at once.
        """
        return self.language(batch, *self._see(batch.vision), prefixes or self.prefixes(batch))

    @torch.inference_mode()
    def prefixes(self, batch: PackedBatch) -> PrefixStates:
        """The keys and values of the batch's prefixes. Computes those that are not cached."""
        if missing := self.language.missing_prefixes(batch):
            prefixes = pack_prefixes(missing, self._merge_size, self.device, self.vision_cache.find)
            self.language.compute_prefixes(missing, prefixes, *self._see(prefixes.vision))
        return self.language.cached_prefixes(batch)

    def _see(self, vision: PackedVision | None) -> tuple[Tensor | None, list[Tensor]]:
        """Visual tokens and DeepStack features of the images and clips; None and nothing if there are none."""
        return (None, []) if vision is None else self.vision_cache.complete(vision, self.vision)
