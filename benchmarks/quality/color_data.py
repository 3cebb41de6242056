"""The xkcd survey's 949 colors: names, RGB values, solid swatches, and how different two of them look."""

from __future__ import annotations

from functools import cache

import numpy as np
import PIL.Image
from coloraide import Color
from numpy.typing import NDArray
from tqdm import tqdm

from training.data import COLOR_NAMES, COLORS

NAMES = list(COLOR_NAMES)
COLORS: NDArray[np.uint8] = COLORS  # (949, 3)
SIDE = 64  # of a swatch, in pixels


def swatch(index: int, side: int = SIDE) -> PIL.Image.Image:
    """A solid square of the color."""
    red, green, blue = (int(value) for value in COLORS[index])
    return PIL.Image.new("RGB", (side, side), (red, green, blue))


@cache
def color_differences(count: int) -> NDArray[np.float64]:
    """Of the first `count` colors to one another, (count, count). 13 s for all 949."""
    return ciede2000(COLORS[:count])


def ciede2000(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(num_colors, 3) -> (num_colors, num_colors) differences, under D65."""
    colors = [Color("srgb", list(row / 255)).convert("lab-d65") for row in rgb.astype(float)]
    differences = np.zeros((len(colors), len(colors)))
    for row, color in enumerate(tqdm(colors, desc="CIEDE2000", leave=False)):
        differences[row, :row] = [color.delta_e(other, method="2000") for other in colors[:row]]
    return differences + differences.T
