"""Hidden states of the pooled tokens -> float32 rows on the host.

Which token is pooled, each item's last, `packing` has already said, so that the last layer computes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pool(hidden_states: Tensor) -> Callable[[], NDArray[np.float32]]:
    """(num_items, hidden_size) on the device, after the final norm -> what waits for the same on the host."""
    rows = hidden_states.float().to("cpu", non_blocking=True)  # pinned, and filled when the device comes to it
    if hidden_states.device.type != "cuda":
        return rows.numpy
    # blocking: else the wait spins on a core that preprocessing wants
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(hidden_states.device))

    def wait() -> NDArray[np.float32]:
        copied.synchronize()
        return rows.numpy()

    return wait
