"""An input and the names of its columns -> parts; a part -> rows, fit to be embedded, each or why not.

A data set may come from strangers. Of its strings only those that look like a path (base64 has no dot) are opened, and
only inside the input folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedder.bulk.formats import PARQUET, Part, find_files
from embedder.errors import EmbedderError, InvalidMedia, InvalidRequest, MediaTooLarge
from embedder.settings import Settings

CONTENT = ("text", "image", "video")


@dataclass(frozen=True)
class Columns:
    """Which column is what. Where neither text, image nor video is named, the columns of these names are taken."""

    text: str | None = None
    image: str | None = None
    video: str | None = None
    instruction: str | None = None
    id: str | None = None

    def item_columns(self) -> dict[str, str]:
        """Field of an item -> its column."""
        named = {field: getattr(self, field) for field in CONTENT if getattr(self, field)}
        named = named or {field: field for field in CONTENT}
        return {**named, "instruction": self.instruction} if self.instruction else named


@dataclass(frozen=True)
class Row:
    """`fields` is what `item_from_fields` takes, or why there is none."""

    id: Any
    fields: dict[str, Any] | EmbedderError


class Source:
    """A Parquet or JSONL file, a WebDataset tar, a folder of one of these, or a folder of pictures.

    `id_type` is that of a Parquet file's id column, otherwise string. Raises `ValueError` where the input is none of
    these, or a Parquet file has not the columns.
    """

    def __init__(self, path: Path, columns: Columns, settings: Settings) -> None:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        self.folder = (path if path.is_dir() else path.parent).resolve()
        self.columns, self.settings = columns, settings
        self.format, self.names = find_files(path, self.folder)
        self.id_type = pa.string()
        self._read = {*columns.item_columns().values(), *filter(None, [columns.id])}
        if self.format is PARQUET:
            self._check_parquet()

    def parts(self, rows_per_part: int) -> list[Part]:
        """All rows, in the order of the files' names; `rows_per_part` or fewer in each, but in a tar's."""
        planned = self.format.plan(self.folder, self.names, rows_per_part)
        return [Part(number, **fields) for number, fields in enumerate(planned)]

    def rows(self, part: Part) -> Iterator[Row]:
        """The part's rows, in order. Raises one of `BROKEN_FILE` where the file itself is."""
        for name, record in self.format.read(self.folder, part, self._read):
            row_id = _plain(name)
            if self.columns.id and isinstance(record, Mapping):
                row_id = self._id(record.get(self.columns.id))
            yield Row(row_id, self._fields(record))

    def _id(self, value: Any) -> Any:
        if value is None or not pa.types.is_string(self.id_type):
            return value
        return _plain(value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value))

    def _fields(self, record: Mapping[str, Any] | EmbedderError) -> dict[str, Any] | EmbedderError:
        if isinstance(record, EmbedderError):
            return record
        found = {field: record.get(column) for field, column in self.columns.item_columns().items()}
        try:
            return {
                field: self._media(value, field) if field in ("image", "video") else _text(value, field)
                for field, value in found.items()
                if value is not None
            }
        except EmbedderError as error:
            return error

    def _media(self, value: Any, field: str) -> Any:
        """Bytes and base64 as they are, a path's bytes; also in lists and in the `{bytes, path}` of other data sets."""
        if isinstance(value, list):
            return [self._media(one, field) for one in value]
        if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
            value = value["bytes"] or value["path"]
        if isinstance(value, str) and "." in value and not value.startswith(("data:", "http://", "https://")):
            limit = self.settings.max_image_bytes if field == "image" else self.settings.max_video_bytes
            return self._read_file(value, limit)
        return value

    def _read_file(self, name: str, max_bytes: int) -> bytes:
        shown = repr(name[:80])
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InvalidMedia(f"path {shown} is absolute or has '..'; allowed: relative, inside the input folder")
        try:
            path = (self.folder / name).resolve(strict=True)
            if not path.is_relative_to(self.folder) or not path.is_file():
                raise InvalidMedia(f"path {shown} leads outside or to no file; allowed: files in the input folder")
            if path.stat().st_size > max_bytes:
                raise MediaTooLarge(f"file of {path.stat().st_size} bytes; allowed: up to {max_bytes}")
            return path.read_bytes()
        except (OSError, RuntimeError, ValueError) as error:  # missing; links in a circle; a NUL
            raise InvalidMedia(f"path {shown} cannot be read: {type(error).__name__}") from error

    def _check_parquet(self) -> None:
        columns = self.columns
        named = {name for name in (columns.text, columns.image, columns.video, columns.instruction, columns.id) if name}
        for file in self.names:
            schema = pq.read_schema(self.folder / file)
            if missing := sorted(named - set(schema.names)):
                raise ValueError(f"{file} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
            if not set(columns.item_columns().values()) & set(schema.names):
                raise ValueError(f"{file} has no column text, image or video; it has {', '.join(schema.names)}")
            if columns.id:
                self.id_type = schema.field(columns.id).type


def _text(value: Any, field: str) -> Any:
    """UTF-8 bytes (a member of a tar, a binary column) are text."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{field} is not UTF-8: {error.reason} at byte {error.start}") from error


def _plain(text: str) -> str:
    """A file's name may hold bytes that are no character; Arrow holds characters only."""
    return text.encode("utf-8", "backslashreplace").decode()
