"""Hidden states of the pooled tokens to float32 rows on the host.

`packing` chooses the pooled token, the last one of each item, so that the last layer computes no other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pool(hidden_states: Tensor) -> Callable[[], NDArray[np.float32]]:
    """Start copying (num_items, hidden_size) to the host; the function returned waits for the copy.

    `hidden_states` are on the device, after the final norm. The rows have the same shape, in float32.
    """
    is_cuda = hidden_states.device.type == "cuda"
    rows = hidden_states.float().to("cpu", non_blocking=is_cuda)  # into pinned memory, without waiting for the device
    if not is_cuda:
        return rows.numpy
    # A blocking event sleeps; the default one spins on a core that preprocessing needs.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(hidden_states.device))

    def wait() -> NDArray[np.float32]:
        copied.synchronize()
        return rows.numpy()

    return wait
