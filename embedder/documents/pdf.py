"""The pages of a PDF, rendered by PDFium without JavaScript and without reading fonts of the machine."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium
from numpy.typing import NDArray

from embedder.errors import InvalidMedia

DOTS_PER_INCH = 200  # a page counts as a scan of this resolution; a finer one shows no more to read
POINTS_PER_INCH = 72
MAX_SIDE_PIXELS = 2**20

_REASONS = {
    pdfium.FPDF_ERR_PASSWORD: "the PDF is encrypted and needs a password; allowed: a PDF that opens without one",
    pdfium.FPDF_ERR_SECURITY: "the PDF is encrypted in an unknown way; allowed: a PDF that opens without a password",
    pdfium.FPDF_ERR_FORMAT: "the PDF is damaged: it has no readable structure",
}


class PdfDocument:
    """An open PDF. Raises `InvalidMedia`, as do all methods. The file stays mapped, not read."""

    def __init__(self, file: mmap.mmap) -> None:
        address = (ctypes.c_char * len(file)).from_buffer(file)
        handle = pdfium.FPDF_LoadMemDocument64(address, len(file), None)
        if not handle:
            code = pdfium.FPDF_GetLastError()
            raise InvalidMedia(_REASONS.get(code, f"the PDF cannot be opened (PDFium's error {code})"))
        self._file, self._address = file, address  # PDFium reads them until the process ends
        self._document = pypdfium2.PdfDocument(handle)
        self.num_pages = len(self._document)
        self._number = 0
        self._page: pypdfium2.PdfPage | None = None

    def size(self, number: int) -> tuple[int, int]:
        """Height and width of page `number`, from 1, in pixels of a scan."""
        sides = [side / POINTS_PER_INCH * DOTS_PER_INCH for side in self._open(number).get_size()[::-1]]
        if not all(0 < side < MAX_SIDE_PIXELS for side in sides):
            raise InvalidMedia(
                f"page of {sides[1]:g}x{sides[0]:g} pixels at {DOTS_PER_INCH} dots per inch; "
                f"allowed: more than 0, less than {MAX_SIDE_PIXELS} on each side"
            )
        height, width = (max(1, round(side)) for side in sides)
        return height, width

    def render(self, number: int, height: int, width: int) -> NDArray[np.uint8]:
        """The page as (height, width, 3) RGB, on white, with its annotations."""
        bitmap = pypdfium2.PdfBitmap.new_native(width, height, pdfium.FPDFBitmap_BGR)
        bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        flags = pdfium.FPDF_ANNOT | pdfium.FPDF_REVERSE_BYTE_ORDER
        pdfium.FPDF_RenderPageBitmap(bitmap, self._open(number), 0, 0, width, height, 0, flags)
        values: NDArray[np.uint8] = bitmap.to_numpy()
        return values

    def text(self, number: int) -> str:
        """The page's text layer, in the order of the file; empty if it has none."""
        text = self._open(number).get_textpage()
        try:
            return str(text.get_text_bounded(errors="replace")).replace("\r\n", "\n")
        finally:
            text.close()

    def close(self) -> None:
        """Free the document's memory."""
        if self._page is not None:
            self._page.close()
            self._page = None
        self._document.close()

    def _open(self, number: int) -> pypdfium2.PdfPage:
        if self._number != number or self._page is None:
            if self._page is not None:
                self._page.close()
                self._page = None
            try:
                self._page = self._document[number - 1]
            except pypdfium2.PdfiumError as error:
                raise InvalidMedia(f"page {number} is damaged: PDFium cannot load it") from error
            self._number = number
        return self._page


def import_everything() -> None:
    """Render a page with text: what PDFium and Python load when first used needs files."""
    document = pypdfium2.PdfDocument.new()
    page = document.new_page(72, 72)
    shown = pdfium.FPDFPageObj_NewTextObj(document, b"Helvetica", ctypes.c_float(12))
    letters = "a".encode("utf-16-le") + b"\0\0"
    pdfium.FPDFText_SetText(shown, ctypes.cast(ctypes.c_char_p(letters), pdfium.FPDF_WIDESTRING))
    pdfium.FPDFPage_InsertObject(page, shown)
    page.gen_content()
    page.render(scale=1).to_numpy()
    text = page.get_textpage()
    text.get_text_bounded(errors="replace")
    text.close()
    b"\xff".decode("utf-16-le", "replace")
