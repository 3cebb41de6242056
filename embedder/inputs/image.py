"""An encoded image -> RGB values, upright and resized for the model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedder.inputs.decoder import Decoder
from embedder.inputs.items import Media
from embedder.inputs.limits import MediaLimits, decode_deadline
from embedder.inputs.regimes import Regime
from embedder.inputs.resample import resize


def load_image(
    source: Media, regime: Regime, limits: MediaLimits, deadline: float | None = None, decoder: Decoder | None = None
) -> NDArray[np.uint8]:
    """Decode an image to RGB values, (height, width, 3) uint8, upright and resized for the model.

    Of an animation, the first frame is used. Transparent pixels are composited on white. `deadline` defaults to
    `decode_timeout_s` from now, `decoder` to one that decodes in this thread. Raises `InvalidMedia` and
    `MediaTooLarge`.
    """
    deadline = decode_deadline(limits) if deadline is None else deadline
    image = (decoder or Decoder()).open_image(source, limits, deadline)
    regime.resize_image(image.height, image.width)  # refuses extreme aspect ratios before decoding
    upright = image.decode()
    return resize(upright, [regime.resize_image(upright.height, upright.width)])
