"""The model's rows come to the host as float32, in order."""

from __future__ import annotations

import numpy as np
import torch

from embedder.model.pooling import pool


def test_rows_are_float32_with_the_values_of_the_weights_dtype() -> None:
    states = torch.tensor([[1.0, 2.5], [-3.0, 0.0078125]], dtype=torch.bfloat16)  # all exact in bfloat16
    rows = pool(states)()
    assert rows.dtype == np.float32
    assert rows.tolist() == [[1.0, 2.5], [-3.0, 0.0078125]]
