"""The pages of a TIFF file, as scanners and fax servers write them."""

from __future__ import annotations

import io
import mmap

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
from numpy.typing import NDArray

from embedder.errors import InvalidMedia
from embedder.inputs.limits import FixedLimits, check_num_pixels
from embedder.inputs.picture import decode_image

_ERRORS = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, OverflowError)


class TiffDocument:
    """An open TIFF file. Raises `InvalidMedia` and `MediaTooLarge`, as do all methods."""

    def __init__(self, file: mmap.mmap, limits: FixedLimits, max_pages: int) -> None:
        self._limits = limits
        try:
            self._image = PIL.TiffImagePlugin.TiffImageFile(io.BytesIO(file))
            self.num_pages = 1
            while self.num_pages <= max_pages and self._has_page(self.num_pages):
                self.num_pages += 1
        except _ERRORS as error:
            raise InvalidMedia(f"the TIFF file cannot be read: {error}") from error

    def size(self, number: int) -> tuple[int, int]:
        """Height and width of page `number`, from 1, in pixels."""
        try:
            self._image.seek(number - 1)
        except _ERRORS as error:
            raise InvalidMedia(f"page {number} is damaged: {error}") from error
        width, height = self._image.size
        check_num_pixels("page", width, height, self._limits)
        return height, width

    def render(self, number: int, height: int, width: int) -> NDArray[np.uint8]:
        """The page as (height, width, 3) RGB, resized."""
        self.size(number)
        try:
            page = decode_image(self._image.copy(), is_raw=self._limits.raw_orientation)
        except _ERRORS as error:
            raise InvalidMedia(f"page {number} is damaged: {error}") from error
        return np.asarray(page.resize((width, height), PIL.Image.Resampling.BICUBIC))

    def text(self, number: int) -> str:
        """A TIFF page has no text layer."""
        return ""

    def close(self) -> None:
        """Free the document's memory."""
        self._image.close()

    def _has_page(self, index: int) -> bool:
        try:
            self._image.seek(index)
        except EOFError:
            return False
        return True


def import_everything() -> None:
    """Write and read a small file: what Pillow loads when first used needs files."""
    import PIL.ImageCms  # converts pages in the color space LAB

    for compression in (None, "tiff_lzw", "group4"):
        file = io.BytesIO()
        PIL.Image.new("1" if compression == "group4" else "RGB", (16, 16)).save(file, "TIFF", compression=compression)
        memory = mmap.mmap(-1, len(file.getvalue()))
        memory.write(file.getvalue())
        TiffDocument(memory, FixedLimits(2**20, 2**20, 2**20, 60.0, False), 2).render(1, 8, 8)
