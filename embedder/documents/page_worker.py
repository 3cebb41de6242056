"""The process that opens one document after another, and renders their pages. `pages` starts it and speaks with it.

It is confined as a decoding process is, and untrusted from its first task on. The dialogue:

    parent: open, with the file                process: opened, with the number of pages
    parent: size, of a page                    process: size, as a scan of this page would have
    parent: render, with memory for the page   process: page, after it has written pixels, and text if it is asked for

An error answers a message: `error` with the name of its class.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Any

import numpy as np

from embedder.documents import pdf, tiff
from embedder.documents.limits import MAX_PAGES, MAX_TEXT_BYTES
from embedder.errors import EmbedderError, InvalidMedia, MediaTooLarge
from embedder.inputs import sandbox
from embedder.inputs.formats import find_format
from embedder.inputs.limits import FixedLimits
from embedder.inputs.process_connection import Ended, confine
from embedder.inputs.shared_memory import RGB_BYTES_PER_PIXEL

DOCUMENT_BYTES = 2**29  # of memory for an open document and one page

Document = pdf.PdfDocument | tiff.TiffDocument


class _Worker:
    def __init__(self, limits: FixedLimits) -> None:
        self._limits = limits
        self._document: Document | None = None

    def answer(self, message: dict[str, Any], descriptor: int | None) -> dict[str, Any]:
        """Do what one message asks for. Raises the document's error."""
        if message["type"] == "open":
            assert descriptor is not None
            if self._document is not None:
                self._document.close()
                self._document = None
            self._document = _open(_map(descriptor, message["num_bytes"], mmap.MAP_PRIVATE), self._limits)
            return {"type": "opened", "num_pages": self._document.num_pages}
        assert self._document is not None
        if message["type"] == "size":
            height, width = self._document.size(message["page"])
            return {"type": "size", "height": height, "width": width}
        assert descriptor is not None
        num_values = RGB_BYTES_PER_PIXEL * message["height"] * message["width"]
        with _map(descriptor, num_values + MAX_TEXT_BYTES, mmap.MAP_SHARED) as memory:
            pixels = self._document.render(message["page"], message["height"], message["width"])
            memory[:num_values] = np.ascontiguousarray(pixels).tobytes()
            text = self._document.text(message["page"]) if message["with_text"] else ""
            encoded = text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
            memory[num_values : num_values + len(encoded)] = encoded
        return {"type": "page", "num_text_bytes": len(encoded)}


def main(descriptor: int, parent: int, limits: dict[str, Any]) -> None:
    """Serve documents until the socket `descriptor` is closed. `parent`: process id. `limits`: FixedLimits'."""
    process = confine(descriptor, parent, _import_everything)
    address_space = process.address_space + DOCUMENT_BYTES
    fixed = FixedLimits(**limits)
    worker, num_file_bytes = _Worker(fixed), 0
    with contextlib.suppress(Ended):
        while True:
            message, file = process.connection.receive()
            num_file_bytes = message.get("num_bytes", num_file_bytes)
            sandbox.limit_task(address_space + num_file_bytes, fixed.decode_timeout_s)
            try:
                answer = worker.answer(message, file)
            except MemoryError:
                limit = f"{DOCUMENT_BYTES // 2**20} MiB"
                answer = _error(MediaTooLarge(f"the page takes more than {limit} of memory; allowed: up to that"))
            except EmbedderError as error:
                answer = _error(error)
            process.connection.send(**answer)


def _import_everything() -> None:
    pdf.import_everything()
    tiff.import_everything()


def _error(error: EmbedderError) -> dict[str, Any]:
    return {"type": "error", "error": type(error).__name__, "message": error.message[:1000]}


def _map(descriptor: int, num_bytes: int, flags: int) -> mmap.mmap:
    """The file's bytes in memory; private ones are copied when written to. Closes the descriptor."""
    try:
        return mmap.mmap(descriptor, num_bytes, flags=flags)
    finally:
        os.close(descriptor)


def _open(file: mmap.mmap, limits: FixedLimits) -> Document:
    start = bytes(file[:1024])
    found = find_format(start)
    document: Document
    if found is not None and found.name == "TIFF":
        document = tiff.TiffDocument(file, limits, MAX_PAGES)
    elif b"%PDF" in start:  # readers allow bytes before it
        document = pdf.PdfDocument(file)
    else:
        what = f"it is {found.description}" if found else f"it starts with {start[:12]!r}"
        raise InvalidMedia(f"not a PDF or TIFF file: {what}")
    if not document.num_pages:
        raise InvalidMedia("the document has no pages; allowed: 1 and more")
    if document.num_pages > MAX_PAGES:
        raise MediaTooLarge(f"document of more than {MAX_PAGES} pages; allowed: up to {MAX_PAGES}. Split it")
    return document
