"""How a picture is stored: turned or mirrored, as EXIF metadata or a video's display matrix says.

Both are expressed as EXIF's number, from 1 (upright) to 8. No torch, so that a process that only decodes can import it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Transpose

UPRIGHT = 1
EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {  # EXIF's number -> what makes the picture upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def exif_orientation(image: PIL.Image.Image) -> int:
    """EXIF's orientation of an image that is loaded; 1 if it has none, an unknown one, or damaged metadata."""
    try:
        number = image.getexif().get(EXIF_ORIENTATION, UPRIGHT)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, struct.error):  # as viewers do, ignore damage
        return UPRIGHT
    return number if number in _TRANSPOSE else UPRIGHT


def matrix_orientation(matrix: Sequence[float]) -> int:
    """EXIF's number for a display matrix of nine values, row by row, as MP4's track header has it.

    A stored pixel at (x, y) is shown at (a x + c y, b x + d y), for a matrix a, b, _, c, d, ... An angle that is no
    multiple of 90 degrees counts as the nearest one.
    """
    a, b, _, c, d = matrix[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return {(True, True): 1, (False, True): 2, (False, False): 3, (True, False): 4}[a >= 0, d >= 0]
    return {(True, True): 5, (True, False): 6, (False, False): 7, (False, True): 8}[b >= 0, c >= 0]


def turn_upright(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    """The picture as a person sees it."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def turn_values(values: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The same for an array, (height, width, channels). The result is a view."""
    is_mirrored_x, is_mirrored_y = orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)
    turned = values[:: -1 if is_mirrored_y else 1, :: -1 if is_mirrored_x else 1]
    return turned.swapaxes(0, 1) if orientation >= 5 else turned
