"""The service with a model that computes nothing: what a request costs around it. For `bentoml serve`."""

from __future__ import annotations

import numpy as np

from embedder.engine import WaitForRows
from embedder.library import Embedder
from embedder.preprocess import ModelInput
from service import Qwen3VLEmbedding as Qwen3VLEmbedding


def _no_model(self: Embedder, inputs: list[ModelInput]) -> WaitForRows:
    row = np.random.default_rng(0).standard_normal(self.forward.hidden_size, np.float32)
    return lambda: np.tile(row, (len(inputs), 1))


Embedder._launch = _no_model  # type: ignore[method-assign]
