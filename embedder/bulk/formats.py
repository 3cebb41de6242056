"""The operator's files -> parts, the same in every run over the same files; a part -> its records, one at a time.

One pair of functions for each format. Nothing here holds more of a file than a few rows.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from embedder.errors import EmbedderError, InvalidRequest, MediaTooLarge

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
VIDEOS = ("mp4", "mov", "webm", "mkv")
MEMBERS = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(VIDEOS, "video"), "txt": "text"}  # column by extension
READ_ROWS = 64  # of Parquet at once: a row may be a picture of megabytes
MAX_ROW_BYTES = 64 * 2**20  # of a line, or of a tar's member
BROKEN_FILE = (OSError, pa.ArrowException, tarfile.TarError)  # what reading or writing one raises

Record = tuple[str, Mapping[str, Any] | EmbedderError]  # the row's name, and its columns or why it has none


@dataclass(frozen=True)
class Part:
    """`num_rows` of a file from `first_row` on, which is at byte `offset` of JSONL; or the pictures `names`.

    A tar is one part: how many rows it has (0) is not known before it is read. Paths are relative to the folder.
    """

    number: int
    path: str = ""
    first_row: int = 0
    num_rows: int = 0
    offset: int = 0
    names: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Fit for Ray."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The way back."""
        fields = json.loads(text)
        return cls(**{**fields, "names": tuple(fields["names"])})


@dataclass(frozen=True)
class Format:
    """`plan`: folder, files and rows a part -> fields of parts. `read`: folder, part and columns -> records."""

    suffixes: tuple[str, ...]
    plan: Callable[[Path, Sequence[str], int], Iterator[dict[str, Any]]]
    read: Callable[[Path, Part, set[str]], Iterator[Record]]


def find_files(path: Path, folder: Path) -> tuple[Format, list[str]]:
    """What the input is, and its files, sorted, relative to the folder. Pictures count only beside nothing else.

    Raises `ValueError` where there is none, or more than one format.
    """
    found = [path.resolve()] if path.is_file() else sorted(one for one in folder.rglob("*") if one.is_file())
    for formats in ((PARQUET, JSONL, TAR), (FOLDER,)):
        of_each = {one.suffixes: [file for file in found if file.suffix.lower() in one.suffixes] for one in formats}
        present = [one for one in formats if of_each[one.suffixes]]
        if len(present) > 1:
            raise ValueError(f"{path} has files of several formats: {[one.suffixes for one in present]}; name one file")
        if present:
            return present[0], [str(file.relative_to(folder)) for file in of_each[present[0].suffixes]]
    allowed = [suffix for one in (PARQUET, JSONL, TAR, FOLDER) for suffix in one.suffixes]
    raise ValueError(f"{path}: no file to embed; allowed: {', '.join(allowed)}")


def plan_parquet(folder: Path, names: Sequence[str], rows_per_part: int) -> Iterator[dict[str, Any]]:
    for name in names:
        num_rows = pq.read_metadata(folder / name).num_rows
        for row in range(0, num_rows, rows_per_part):
            yield {"path": name, "first_row": row, "num_rows": min(rows_per_part, num_rows - row)}


def read_parquet(folder: Path, part: Part, columns: set[str]) -> Iterator[Record]:
    with pq.ParquetFile(folder / part.path) as file:
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes, initial=0))
        group = bisect_right(ends, part.first_row) - 1
        skip, number, end = part.first_row - ends[group], part.first_row, part.first_row + part.num_rows
        for batch in file.iter_batches(READ_ROWS, range(group, len(sizes)), columns=sorted(columns)):
            for record in batch.slice(min(skip, batch.num_rows), end - number).to_pylist():
                yield f"{part.path}#{number}", record
                number += 1
            skip -= min(skip, batch.num_rows)
            if number == end:
                return


def plan_jsonl(folder: Path, names: Sequence[str], rows_per_part: int) -> Iterator[dict[str, Any]]:
    for name in names:
        with (folder / name).open("rb") as file:
            numbered = enumerate(offset for offset, _ in _lines(file))
            while run := list(itertools.islice(numbered, rows_per_part)):
                yield {"path": name, "first_row": run[0][0], "num_rows": len(run), "offset": run[0][1]}


def read_jsonl(folder: Path, part: Part, columns: set[str]) -> Iterator[Record]:
    with (folder / part.path).open("rb") as file:
        file.seek(part.offset)
        for number, (_, line) in enumerate(itertools.islice(_lines(file), part.num_rows), part.first_row):
            yield f"{part.path}#{number}", _parse(line)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offset and text of each line that is not blank; of one that is too long no more than shows it."""
    offset = file.tell()
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW_BYTES + 1)
        if line.strip():
            yield offset, line
        offset = file.tell()


def _parse(line: bytes) -> Mapping[str, Any] | EmbedderError:
    if len(line) > MAX_ROW_BYTES:
        return MediaTooLarge(f"line of more than {MAX_ROW_BYTES} bytes; allowed: up to that")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return InvalidRequest(f"the line is not valid JSON: {error}")
    return record if isinstance(record, dict) else InvalidRequest("the line is not a JSON object")


def plan_tar(folder: Path, names: Sequence[str], rows_per_part: int) -> Iterator[dict[str, Any]]:
    return ({"path": name} for name in names)


def read_tar(folder: Path, part: Part, columns: set[str]) -> Iterator[Record]:
    """WebDataset: members that follow each other and are named alike up to the first dot are one row.

    A member is the column that its extension names, and also `text` (txt), `image` or `video`; the first one counts.
    """
    with tarfile.open(folder / part.path) as tar:
        files = (member for member in tar if member.isreg())
        for key, members in itertools.groupby(files, lambda member: _split(member.name)[0]):
            record: dict[str, Any] = {}
            large: EmbedderError | None = None
            for member in members:
                extension = _split(member.name)[1]
                wanted = {extension, MEMBERS.get(extension, "")} & columns - set(record)
                if wanted and member.size > MAX_ROW_BYTES:
                    large = MediaTooLarge(f"member of {member.size} bytes; allowed: up to {MAX_ROW_BYTES}")
                elif wanted:
                    opened = tar.extractfile(member)
                    assert opened is not None  # a regular file
                    record |= dict.fromkeys(wanted, opened.read())
            tar.members.clear()  # type: ignore[attr-defined]  # or it remembers all that it has passed
            yield key, large or record | {"__key__": key}


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension.lower()


def plan_folder(folder: Path, names: Sequence[str], rows_per_part: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(names), rows_per_part):
        some = tuple(names[start : start + rows_per_part])
        yield {"names": some, "num_rows": len(some)}


def read_folder(folder: Path, part: Part, columns: set[str]) -> Iterator[Record]:
    """The picture's path is its name and its column `image`: a path inside the folder like any other."""
    return ((name, {"image": name}) for name in part.names)


PARQUET = Format((".parquet",), plan_parquet, read_parquet)
JSONL = Format((".jsonl", ".ndjson"), plan_jsonl, read_jsonl)
TAR = Format((".tar",), plan_tar, read_tar)
FOLDER = Format(tuple(f".{extension}" for extension in IMAGES), plan_folder, read_folder)
