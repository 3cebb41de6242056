"""The 949 colors of the xkcd survey: names, RGB values, swatches and color differences."""

from __future__ import annotations

from functools import cache

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from tqdm import tqdm

from training.data import COLOR_NAMES, COLORS

NAMES = list(COLOR_NAMES)
COLORS: NDArray[np.uint8] = COLORS  # (949, 3)
SIDE = 64  # of a swatch in pixels


def swatch(index: int, side: int = SIDE) -> PIL.Image.Image:
    """A solid square of the color."""
    red, green, blue = (int(value) for value in COLORS[index])
    return PIL.Image.new("RGB", (side, side), (red, green, blue))


def equal_colors(count: int) -> NDArray[np.bool_]:
    """Which of the first `count` colors are equal, (count, count): the swatch of one is right for the other's name."""
    return np.asarray((COLORS[:count, None] == COLORS[None, :count]).all(axis=-1))


@cache
def color_differences(count: int) -> NDArray[np.float64]:
    """Pairwise differences of the first `count` colors, (count, count). All 949 take 13 s."""
    return ciede2000(COLORS[:count])


def ciede2000(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Pairwise CIEDE2000 differences under D65, (num_colors, num_colors), of (num_colors, 3) sRGB values."""
    from coloraide import Color  # of the extra `quality`, which only this needs

    colors = [Color("srgb", list(row / 255)).convert("lab-d65") for row in rgb.astype(float)]
    differences = np.zeros((len(colors), len(colors)))
    for row, color in enumerate(tqdm(colors, desc="CIEDE2000", leave=False)):
        differences[row, :row] = [color.delta_e(other, method="2000") for other in colors[:row]]
    return differences + differences.T
