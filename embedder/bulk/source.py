"""An input and its column names -> parts; a part -> rows, each with the fields of an item or an error.

A data set can be untrusted. Strings that look like a path (base64 has no dot) are opened only inside the input folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedder.bulk.formats import FOLDER, JSONL, PARQUET, Part, Places, find_files, find_jsonl_columns
from embedder.bulk.options import MIN_FILES_PER_PART, ROWS_PER_PART
from embedder.bulk.pages import FolderPages, is_clip, is_document, read_inside, split_page
from embedder.bulk.segments import Segment, split_segment
from embedder.errors import EmbedderError, InvalidRequest
from embedder.inputs.items import Video
from embedder.inputs.regimes import CheckpointRegime, Regime
from embedder.settings import Settings

CONTENT = ("text", "image", "video")
MAX_FOLDER_PARTS = 1000  # of so many new rows that a part has more than the least
_PUBLISHED = CheckpointRegime()


@dataclass(frozen=True)
class Columns:
    """Column names of an item's fields. Without a name for text, image and video, they are `text`, `image`, `video`."""

    text: str | None = None
    image: str | None = None
    video: str | None = None
    instruction: str | None = None
    id: str | None = None

    def item_columns(self) -> dict[str, str]:
        """Fields of an item -> names of their columns."""
        named = {field: getattr(self, field) for field in CONTENT if getattr(self, field)}
        named = named or {field: field for field in CONTENT}
        return {**named, "instruction": self.instruction} if self.instruction else named


@dataclass(frozen=True)
class Row:
    """`fields`: the argument of `item_from_fields`, or the row's error. `text`: the text layer of a page.

    `segment`: the part of a clip that is the row; None: it is not a segment.
    """

    id: Any
    fields: dict[str, Any] | EmbedderError
    text: str | None = None
    segment: Segment | None = None


class Source:
    """A Parquet or JSONL file, a WebDataset tar, a folder of one of these, or one of pictures, clips and documents.

    `id_type`: type of the id column in Parquet, otherwise string. `state`: the state folder of the output.
    `segment_s`: length of the segments of clips in a folder, in seconds; None: a clip is one row. Raises
    `ValueError` if the input is none of these, or if a column is missing.
    """

    def __init__(
        self,
        path: Path,
        columns: Columns,
        settings: Settings,
        state: Path | None = None,
        segment_s: float | None = None,
    ) -> None:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        self.folder = (path if path.is_dir() else path.parent).resolve()
        self.columns, self.settings = columns, settings
        files = find_files(path, self.folder)
        self.format, self.names, self.num_left_out = files.format, files.names, files.num_left_out
        self._pages = FolderPages(self.folder, settings, state, segment_s)
        self.has_documents = self.format is FOLDER and any(map(is_document, self.names))
        self.id_type = pa.string()
        self._read = {*columns.item_columns().values(), *filter(None, [columns.id])}
        self._check_columns()

    def parts(
        self,
        rows_per_part: int | None = None,
        names: Sequence[str] | None = None,
        existing: Sequence[Part] = (),
        first_number: int = 0,
    ) -> list[Part]:
        """The rows of the files `names` (None: of all) in parts, in their order. A tar is one part.

        `existing`: parts whose rows are left out. `first_number`: number of the first part. `rows_per_part` None: a
        number that depends on the format.
        """
        names = self.names if names is None else names
        if self.format is FOLDER:
            names = list(self._pages.row_names(names))
        if rows_per_part is None:
            rows_per_part = ROWS_PER_PART
            if self.format is FOLDER:
                rows_per_part = min(rows_per_part, max(MIN_FILES_PER_PART, len(names) // MAX_FOLDER_PARTS))
        planned = self.format.plan(self.folder, names, rows_per_part, existing)
        return [Part(number, **fields) for number, fields in enumerate(planned, first_number)]

    def rows(self, part: Part, regime: Regime = _PUBLISHED, only: Places = None) -> Iterator[Row]:
        """The rows of a part, in order. Raises one of `FILE_ERRORS` if the file is broken.

        `regime`: the model's, which determines the size of a document's pages. `only`: positions in the part, from 0;
        other rows are left out.
        """
        for place, (name, record) in enumerate(self.format.read(self.folder, part, self._read, only)):
            if only is not None and place not in only:
                continue
            if self.format is FOLDER:
                yield self._row_of_folder(name, record, regime)
                continue
            row_id = valid_unicode(name)
            if self.columns.id and isinstance(record, Mapping):
                row_id = self._id(record.get(self.columns.id))
            yield Row(row_id, self._fields(record))

    def close(self) -> None:
        """End the processes that open documents."""
        self._pages.close()

    def _row_of_folder(self, name: str, record: Mapping[str, Any] | EmbedderError, regime: Regime) -> Row:
        document, number = split_page(name)
        row_id = valid_unicode(name)
        if is_clip(document):
            segment = split_segment(name)[1]
            try:
                video = Video(self._pages.clip(document), segment=segment)
            except EmbedderError as error:
                return Row(row_id, error, segment=segment)
            return Row(row_id, {"video": video}, segment=segment)
        if not is_document(document):
            return Row(row_id, self._fields(record, {field: field for field in CONTENT}))
        try:
            page = self._pages.render(document, number, regime)
            return Row(row_id, {"image": page.image}, page.text)
        except EmbedderError as error:
            return Row(row_id, error)

    def _id(self, value: Any) -> Any:
        if value is None or not pa.types.is_string(self.id_type):
            return value
        return valid_unicode(value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value))

    def _fields(
        self, record: Mapping[str, Any] | EmbedderError, columns: Mapping[str, str] | None = None
    ) -> dict[str, Any] | EmbedderError:
        """`columns`: fields of an item -> names of their columns; None: those of the command."""
        if isinstance(record, EmbedderError):
            return record
        found = {field: record.get(column) for field, column in (columns or self.columns.item_columns()).items()}
        try:
            return {
                field: self._media(value, field) if field in ("image", "video") else _text(value, field)
                for field, value in found.items()
                if value is not None
            }
        except EmbedderError as error:
            return error

    def _media(self, value: Any, field: str) -> Any:
        """Replace a path by the file's bytes, also in lists and in the `{bytes, path}` of Hugging Face data sets."""
        if isinstance(value, list):
            return [self._media(one, field) for one in value]
        if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
            value = value["bytes"] or value["path"]
        if isinstance(value, str) and "." in value and not value.startswith(("data:", "http://", "https://")):
            limit = self.settings.max_image_bytes if field == "image" else self.settings.max_video_bytes
            return read_inside(self.folder, value, limit)
        return value

    def _check_columns(self) -> None:
        """Raises `ValueError` if the columns that are named, or all columns of content, are missing."""
        columns = self.columns
        named = {name for name in astuple(columns) if name}
        if self.format is PARQUET:
            for file in self.names:
                schema = pq.read_schema(self.folder / file)
                self._check_found(file, named, set(schema.names))
                if columns.id:
                    self.id_type = schema.field(columns.id).type
        elif self.format is JSONL:
            found = find_jsonl_columns(self.folder, self.names, named or set(CONTENT))
            self._check_found("the input", named, found)
        elif self.format is FOLDER:
            self._check_found("a folder of pictures and clips", named, {"image", "video"})

    def _check_found(self, where: str, named: set[str], found: set[str]) -> None:
        existing = ", ".join(sorted(found)) or "none"
        if missing := sorted(named - found):
            raise ValueError(f"{where} has no column {', '.join(missing)}; its columns: {existing}")
        if not set(self.columns.item_columns().values()) & found:
            raise ValueError(f"{where} has no column text, image or video; its columns: {existing}")


def _text(value: Any, field: str) -> Any:
    """Decode bytes (a member of a tar, a binary column) as UTF-8."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{field} is not UTF-8: {error.reason} at byte {error.start}") from error


def valid_unicode(text: str) -> str:
    """Escape what is not Unicode: file names can hold any bytes, Arrow's strings cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
