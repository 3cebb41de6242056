"""A file -> its pages as pictures. The file is opened and rendered in a process that can be killed, never here.

A page is treated like a scan of `pdf.DOTS_PER_INCH`, and is rendered directly at the size to which such a scan would be
reduced for the model. So it uses the model's pixel budget, and every rendered pixel is embedded.
"""

from __future__ import annotations

import mmap
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import PIL.Image

from embedder.documents.limits import MAX_PAGES, MAX_TEXT_BYTES
from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.decoder import repeated_if_killed
from embedder.inputs.decoder_process import DecoderProcess
from embedder.inputs.limits import MediaLimits
from embedder.inputs.regimes import Regime
from embedder.inputs.shared_memory import RGB_BYTES_PER_PIXEL, memory_file

DOCUMENT_SUFFIXES = (".pdf", ".tif", ".tiff")
MAX_DOCUMENT_BYTES = 2**30
DOCUMENTS_PER_PROCESS = 50  # then a new one takes over, without what the documents have left in memory
MAX_LOST_PAGES = 3  # pages on which the process was killed or has died; then no more pages of the document are tried

_PROGRAM = "embedder.documents.page_worker"
_ERRORS = {one.__name__: one for one in (InvalidMedia, MediaTooLarge)}


@dataclass(frozen=True)
class Page:
    """A page as a picture in the size that is embedded, and its text layer if it was asked for."""

    image: PIL.Image.Image
    text: str


@dataclass(frozen=True, eq=False)
class EncodedDocument:
    """A document as bytes. Two objects are different documents."""

    data: bytes


Source = Path | EncodedDocument


class DocumentReader:
    """Opens documents one after another, in one process that is replaced when a document has ended it.

    Use it in one thread, and close it, or use it in a `with` block. All methods raise `InvalidMedia` and
    `MediaTooLarge`. If somebody has killed the process, most often the kernel, a second one repeats the task.
    """

    def __init__(self, limits: MediaLimits) -> None:
        self._process = DecoderProcess(limits, lambda _: self._forget(), _PROGRAM)
        self._limits = limits
        self._opened: Source | None = None  # in the process
        self._num_pages = self._num_opened = 0
        self._lost: dict[Source, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.stop()

    def count_pages(self, source: Source) -> int:
        """Open the document -> its number of pages, at least 1."""
        return repeated_if_killed(lambda: self._count_pages(source))

    def render(self, source: Source, number: int, regime: Regime, *, with_text: bool = True) -> Page:
        """Page `number`, from 1, in the size that `regime` gives to a scan of it.

        Reading the text of a page with millions of characters can take more memory than there is; rendering does not.
        """
        if self._lost.get(source, 0) >= MAX_LOST_PAGES:
            raise InvalidMedia(f"not rendered: {MAX_LOST_PAGES} pages of this document took too long or failed")
        if not 1 <= number <= self.count_pages(source):
            raise InvalidMedia(f"page {number}; the document has pages 1 to {self._num_pages}")
        try:
            return repeated_if_killed(lambda: self._render(source, number, regime, with_text))
        finally:
            if self._opened is None:
                self._lost[source] = self._lost.get(source, 0) + 1

    def forget(self, source: Source) -> None:
        """Keep nothing of a document that will not be asked for again."""
        self._lost.pop(source, None)
        if self._opened is source:
            self._forget()

    def _count_pages(self, source: Source) -> int:
        if source != self._opened:
            self._open(source)
        return self._num_pages

    def _open(self, source: Source) -> None:
        if self._num_opened % DOCUMENTS_PER_PROCESS == 0:
            self._process.stop()
        self._num_opened += 1
        self._forget()
        descriptor, num_bytes = _open_file(source) if isinstance(source, Path) else _share(source.data)
        try:
            self._process.start()
            opened = self._ask(descriptor, "opened", type="open", num_bytes=num_bytes)
        finally:
            os.close(descriptor)
        self._num_pages = self._integer(opened, "num_pages", 1, MAX_PAGES)
        self._opened = source

    def _render(self, source: Source, number: int, regime: Regime, with_text: bool) -> Page:
        self._count_pages(source)  # opens the document again if the process was killed
        scan = self._ask(None, "size", type="size", page=number)
        height, width = (self._integer(scan, side, 1, 2**20) for side in ("height", "width"))
        step = regime.resize_image(height, width)
        num_values = RGB_BYTES_PER_PIXEL * step.height * step.width
        with memory_file(num_values + MAX_TEXT_BYTES) as descriptor:
            task = {"page": number, "height": step.height, "width": step.width, "with_text": with_text}
            page = self._ask(descriptor, "page", type="render", **task)
            num_text = self._integer(page, "num_text_bytes", 0, MAX_TEXT_BYTES)
            with mmap.mmap(descriptor, num_values + MAX_TEXT_BYTES) as memory:
                pixels, text = memory[:num_values], memory[num_values : num_values + num_text]
        image = PIL.Image.frombytes("RGB", (step.width, step.height), pixels)
        return Page(image, text.decode("utf-8", "ignore").replace("\0", ""))

    def _ask(self, descriptor: int | None, expected: str, **message: Any) -> dict[str, Any]:
        self._process.send(descriptor, **message)
        answer = self._process.receive(time.monotonic() + self._limits.decode_timeout_s)
        if answer.get("type") == "error":
            raise _ERRORS.get(str(answer.get("error")), InvalidMedia)(str(answer.get("message"))[:1000])
        if answer.get("type") != expected:
            raise self._wrong_answer()
        return answer

    def _integer(self, message: dict[str, Any], name: str, minimum: int, maximum: int) -> int:
        value = message.get(name)
        if not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._wrong_answer()
        return value

    def _wrong_answer(self) -> InvalidMedia:
        self._process.replace("crash", "it gave an impossible answer")
        return InvalidMedia("the document is damaged: it makes its reader fail")

    def _forget(self) -> None:
        self._opened, self._num_pages = None, 0


def _open_file(path: Path) -> tuple[int, int]:
    """A descriptor of the file, and its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidMedia(f"the document cannot be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise InvalidMedia("the document is empty (0 bytes)" if not status.st_size else "the document is no file")
        if status.st_size > MAX_DOCUMENT_BYTES:
            raise MediaTooLarge(f"document of {status.st_size} bytes; allowed: up to {MAX_DOCUMENT_BYTES}")
    except (InvalidMedia, MediaTooLarge):
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _share(data: bytes) -> tuple[int, int]:
    """A descriptor of memory with these bytes, and their number."""
    if not data:
        raise InvalidMedia("the document is empty (0 bytes)")
    with memory_file(len(data)) as descriptor:
        position = 0
        while position < len(data):
            position += os.pwrite(descriptor, memoryview(data)[position:], position)
        return os.dup(descriptor), len(data)
