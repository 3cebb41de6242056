"""The rows of a folder: a row for each picture and clip, and for each page of a document.

The state folder of the output keeps the number of pages of each document, so that a run that is started again need not
open all of them, and the PDF of each office file.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from embedder.bulk.segments import ClipMeter, segment_names, split_segment
from embedder.documents.office import OFFICE_SUFFIXES, convert_to_pdf
from embedder.documents.pages import DOCUMENT_SUFFIXES, DocumentReader, Page
from embedder.errors import EmbedderError, InvalidMedia, MediaTooLarge
from embedder.inputs.formats import VIDEO_SUFFIXES
from embedder.inputs.regimes import Regime
from embedder.settings import Settings

PAGE = "#page="  # between the path of a document and the number of a page, as in links to a page of a PDF


class FolderPages:
    """The files of a folder. `state`: the state folder of the output; None to keep nothing.

    `segment_s`: length of the segments of clips, in seconds; None: a clip is one row.

    Threads may share it; each has a process of its own, which `close` ends.
    """

    def __init__(self, folder: Path, settings: Settings, state: Path | None, segment_s: float | None = None) -> None:
        self._folder = folder
        self._settings = settings
        self._state = state
        self._segment_s = segment_s
        self._own = threading.local()  # a reader's process ends with the thread that has started it
        self._readers: list[DocumentReader] = []

    def row_names(self, names: Sequence[str]) -> Iterator[str]:
        """The name of each row. A document or clip that cannot be opened is one row, which gets its error."""
        counts = self._read_counts()
        found: dict[str, list[float]] = {}
        with ClipMeter(self._settings) as meter:
            for name in names:
                is_long = self._segment_s is not None and is_clip(name)
                if not is_long and not is_document(name):
                    yield name
                    continue
                status = (self._folder / name).stat()
                known = counts.get(name)
                if not known or known[:2] != [status.st_size, status.st_mtime_ns]:
                    size = self._duration_s(name, meter) if is_long else self._count_pages(name)
                    known = [status.st_size, status.st_mtime_ns, size]
                found[name] = known
                yield from self._rows_of_file(name, known[2]) if known[2] else [name]
        if found:
            self._write_counts(counts | found)

    def _rows_of_file(self, name: str, size: float) -> Iterator[str]:
        """`size`: number of pages of a document, seconds of a clip."""
        if is_document(name):
            return (f"{name}{PAGE}{number}" for number in range(1, int(size) + 1))
        assert self._segment_s is not None
        return iter(segment_names(name, size, self._segment_s))

    def clip(self, name: str) -> bytes:
        """The bytes of a clip. Consecutive segments of a clip share them.

        Raises `InvalidMedia` and `MediaTooLarge`.
        """
        if getattr(self._own, "clip_name", None) != name:
            self._own.clip_data = read_inside(self._folder, name, self._settings.max_video_bytes)
            self._own.clip_name = name
        data: bytes = self._own.clip_data
        return data

    def render(self, name: str, number: int, regime: Regime, *, with_text: bool = True) -> Page:
        """Render a page of a document. `number` 0: the document could not be opened; this raises its error.

        Raises `InvalidMedia` and `MediaTooLarge`.
        """
        path = self._path(name)
        if not number:
            self._reader().count_pages(path)
            raise InvalidMedia("the document could not be opened when the run started, but can be opened now")
        return self._reader().render(path, number, regime, with_text=with_text)

    def close(self) -> None:
        """End the processes."""
        for reader in self._readers:
            reader.close()

    def _count_pages(self, name: str) -> int:
        try:
            return self._reader().count_pages(self._path(name))
        except EmbedderError:
            return 0

    def _duration_s(self, name: str, meter: ClipMeter) -> float:
        try:
            return meter.duration_s(self.clip(name))
        except EmbedderError:
            return 0.0

    def _reader(self) -> DocumentReader:
        if not hasattr(self._own, "reader"):
            self._own.reader = DocumentReader(self._settings)
            self._readers.append(self._own.reader)
        reader: DocumentReader = self._own.reader
        return reader

    def _path(self, name: str) -> Path:
        """The file to open: the document, or the PDF of an office file, which is made if it is missing."""
        path = path_inside(self._folder, name)
        if not is_office(name):
            return path
        if self._state is None:
            raise InvalidMedia("an office file is converted by embedder.bulk only")
        status = path.stat()
        key = hashlib.sha256(f"{name}\0{status.st_size}\0{status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
        pdf = self._state / "office" / f"{key.hexdigest()}.pdf"
        failed = pdf.with_suffix(".error")
        if failed.exists():
            raise InvalidMedia(failed.read_text())
        if not pdf.exists():
            pdf.parent.mkdir(parents=True, exist_ok=True)
            try:
                convert_to_pdf(path, pdf)
            except (InvalidMedia, MediaTooLarge) as error:
                failed.write_text(error.message)
                raise
        return pdf

    def _read_counts(self) -> dict[str, list[float]]:
        """By name of a document or clip: its size, its time of change, and its number of pages or seconds.

        The last is 0 if it cannot be opened.
        """
        if self._state is None:
            return {}
        try:
            counts: dict[str, list[float]] = json.loads((self._state / "pages.json").read_text())
        except (OSError, ValueError):
            return {}
        return counts

    def _write_counts(self, counts: dict[str, list[float]]) -> None:
        if self._state is None:
            return
        self._state.mkdir(parents=True, exist_ok=True)
        temporary = self._state / f"pages.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(counts))
        temporary.rename(self._state / "pages.json")


def is_document(name: str) -> bool:
    """Whether the file has pages."""
    return PurePosixPath(name).suffix.lower() in (*DOCUMENT_SUFFIXES, *OFFICE_SUFFIXES)


def is_clip(name: str) -> bool:
    """Whether the file is a video."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def is_office(name: str) -> bool:
    """Whether the file has to be converted first."""
    return PurePosixPath(name).suffix.lower() in OFFICE_SUFFIXES


def split_page(row_id: str) -> tuple[str, int]:
    """`a.pdf#page=3` -> path and number of the page; 0 for a file without pages, and for a clip's segment."""
    path, separator, number = row_id.rpartition(PAGE)
    if separator and is_document(path) and number.isdecimal():
        return path, int(number)
    path, segment = split_segment(row_id)
    return (path, 0) if segment and is_clip(path) else (row_id, 0)


def path_inside(folder: Path, name: str) -> Path:
    """The file of this name. Raises `InvalidMedia` if it is not inside the folder, which must be resolved."""
    short_name = repr(name[:80])
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InvalidMedia(f"path {short_name} is absolute or has '..'; allowed: relative, inside the input folder")
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder) or not path.is_file():
            raise InvalidMedia(f"path {short_name} leads outside or to no file; allowed: files in the input folder")
        return path
    except (OSError, RuntimeError, ValueError) as error:  # missing; a cycle of links; a NUL character
        raise InvalidMedia(f"path {short_name} cannot be read: {type(error).__name__}") from error


def read_inside(folder: Path, name: str, max_bytes: int) -> bytes:
    """The bytes of a file inside the folder. Raises `InvalidMedia` and `MediaTooLarge`."""
    path = path_inside(folder, name)
    try:
        if path.stat().st_size > max_bytes:
            raise MediaTooLarge(f"file of {path.stat().st_size} bytes; allowed: up to {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise InvalidMedia(f"path {name[:80]!r} cannot be read: {type(error).__name__}") from error
