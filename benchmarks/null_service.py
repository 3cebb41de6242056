"""The service with a model that computes nothing: what a request costs around it. For `bentoml serve`."""

from __future__ import annotations

import numpy as np

from embedder.engine import WaitForRows
from embedder.library import Embedder
from embedder.preprocess import ModelInput
from service import Qwen3VLEmbedding as Qwen3VLEmbedding

ROW = np.random.default_rng(0).standard_normal(8192, np.float32)


def _no_model(self: Embedder, inputs: list[ModelInput]) -> WaitForRows:
    rows = np.broadcast_to(ROW[: self.forward.hidden_size], (len(inputs), self.forward.hidden_size))
    return lambda: rows


Embedder._launch = _no_model  # type: ignore[method-assign]
