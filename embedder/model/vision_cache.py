"""Vision features of images and clips by content, so that an image that occurs again is not encoded again.

The key is a hash of the preprocessed patches, so equal content has one key however it was sent. All features in one
cache are of the same vision weights: models with other weights do not share it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from embedder.model.packing import PackedPatches, PackedVision

Encode = Callable[[PackedPatches], tuple[Tensor, list[Tensor]]]
CountUses = Callable[[int, int], None]  # the images and clips of a batch: how many were reused, how many encoded


def _count_nothing(_: int, __: int) -> None:
    """For a cache without metrics."""


class VisionCache:
    """Keeps features on the device, up to `max_bytes`, and drops the least recently used; 0: none. Not thread-safe."""

    def __init__(self, max_bytes: int, count_uses: CountUses = _count_nothing) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._count_uses = count_uses
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def find(self, key: bytes) -> Tensor | None:
        """The features, (1 + DeepStack layers, num_visual_tokens, hidden_size), or None."""
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def complete(self, batch: PackedVision, encode: Encode) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens and DeepStack features in the order of `batch.token_index`; `encode` computes the new ones."""
        if batch.patches is not None and not self.max_bytes:
            return encode(batch.patches)
        parts: list[Tensor] = []
        if batch.patches is not None:
            tokens, deepstack = encode(batch.patches)
            layers = zip(*(torch.split(layer, list(batch.num_tokens)) for layer in (tokens, *deepstack)), strict=True)
            parts = [torch.stack(of_one) for of_one in layers]  # a copy: a view would keep the whole batch in memory
            for key, part in zip(batch.keys, parts, strict=True):
                self._put(key, part)
        self._count_uses(len(batch.reused), len(batch.keys))
        if batch.patches is None or batch.reused:
            reused = [parts[one] if isinstance(one, int) else one for one in batch.reused]
            tokens, *deepstack = torch.cat([*parts, *reused], 1)
        return tokens, deepstack

    def _put(self, key: bytes, features: Tensor) -> None:
        if not key or key in self._features or features.nbytes > self.max_bytes:
            return
        self._features[key] = features
        self.num_bytes += features.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.num_bytes -= dropped.nbytes
