"""Hidden states of the pooled tokens -> float32 rows on the host.

Which token is pooled, each item's last, `packing` has already said, so that the last layer computes nothing else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def pool(hidden_states: Tensor) -> NDArray[np.float32]:
    """(num_items, hidden_size) on the device, after the final norm -> the same on the host. Waits for the device."""
    rows: NDArray[np.float32] = hidden_states.float().cpu().numpy()
    return rows
