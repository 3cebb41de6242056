"""Input files -> parts, the same in every run over the same files; a part -> its records, one at a time.

Each format has a function that plans the parts and one that reads a part. Only a few rows of a file are in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from embedder.documents.office import OFFICE_SUFFIXES, find_program
from embedder.documents.pages import DOCUMENT_SUFFIXES
from embedder.errors import EmbedderError, InvalidRequest, MediaTooLarge
from embedder.inputs.formats import IMAGE_SUFFIXES, VIDEO_SUFFIXES

# Column of a tar's member, by the suffix of its name
MEMBER_COLUMNS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    ".txt": "text",
}
READ_ROWS = 64  # read from Parquet at a time; a row can be an image of megabytes
MAX_ROW_BYTES = 64 * 2**20  # of a line, or of a member of a tar
FILE_ERRORS = (OSError, pa.ArrowException, tarfile.TarError)  # raised when a file cannot be read or written

Record = tuple[str, Mapping[str, Any] | EmbedderError]  # name of the row, and its columns or its error
Places = Set[int] | None


@dataclass(frozen=True)
class Part:
    """`num_rows` rows of the file `path` from `first_row` on (in JSONL at byte `offset`), or pictures, clips and pages.

    `names`: those of the pictures, clips and pages. Paths are relative to the input folder. A tar is one part with
    `num_rows` 0: the number is known only after reading it. `digest`: a hash of the rows' bytes (only in JSONL).
    """

    number: int
    path: str = ""
    first_row: int = 0
    num_rows: int = 0
    offset: int = 0
    names: tuple[str, ...] = ()
    digest: str = ""

    def to_json(self) -> str:
        """Serialize to a string, which Ray transports unchanged."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls.from_fields(json.loads(text))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """From JSON, which has a list of names."""
        return cls(**{**fields, "names": tuple(fields["names"])})


@dataclass(frozen=True)
class Format:
    """`plan`: folder, files, rows per part, and parts that exist -> fields of the other parts.

    `read`: folder, part, columns, places -> records. `places`: positions in the part, from 0, of the wanted records;
    others may be empty. None: all are wanted.
    """

    suffixes: tuple[str, ...]
    plan: Callable[[Path, Sequence[str], int, Sequence[Part]], Iterator[dict[str, Any]]]
    read: Callable[[Path, Part, set[str], Places], Iterator[Record]]


@dataclass(frozen=True)
class InputFiles:
    """The files of an input, relative to its folder, sorted. `num_left_out`: number of other files by suffix."""

    format: Format
    names: list[str]
    num_left_out: Mapping[str, int]


def find_files(path: Path, folder: Path) -> InputFiles:
    """Find the files of the input. Pictures, clips and documents count only if no other format is there.

    Raises `ValueError` if there is no file, or if there are several formats.
    """
    files = [path.resolve()] if path.is_file() else sorted(one for one in folder.rglob("*") if one.is_file())
    office = [] if find_program() else [file for file in files if file.suffix.lower() in OFFICE_SUFFIXES]
    files = sorted(set(files) - set(office)) if office else files
    for formats in ((PARQUET, JSONL, TAR), (FOLDER,)):
        present = [one for one in formats if any(file.suffix.lower() in one.suffixes for file in files)]
        if len(present) > 1:
            found = ", ".join(suffix for one in present for suffix in one.suffixes)
            raise ValueError(f"{path} has files of several formats ({found}); allowed: one format; name one file")
        if present:
            names = [str(file.relative_to(folder)) for file in files if file.suffix.lower() in present[0].suffixes]
            left_out = Counter(file.suffix.lower() for file in files)
            for suffix in present[0].suffixes:
                del left_out[suffix]
            without = Counter(f"{file.suffix.lower()} (LibreOffice is not installed)" for file in office)
            return InputFiles(present[0], names, left_out + without)
    allowed = [suffix for one in (PARQUET, JSONL, TAR, FOLDER) for suffix in one.suffixes]
    reason = f" ({len(office)} office files need LibreOffice, which is not installed)" if office else ""
    raise ValueError(f"{path}: no file to embed{reason}; allowed: {', '.join(allowed)}")


def plan_parquet(
    folder: Path, names: Sequence[str], rows_per_part: int, existing: Sequence[Part] = ()
) -> Iterator[dict[str, Any]]:
    for name in names:
        num_rows = pq.read_metadata(folder / name).num_rows
        for row in range(0, num_rows, rows_per_part):
            yield {"path": name, "first_row": row, "num_rows": min(rows_per_part, num_rows - row)}


def read_parquet(folder: Path, part: Part, columns: set[str], places: Places = None) -> Iterator[Record]:
    with pq.ParquetFile(folder / part.path) as file:
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes, initial=0))
        end = part.first_row + part.num_rows
        for group in range(bisect_right(ends, part.first_row) - 1, bisect_left(ends, end)):
            rows = range(max(ends[group], part.first_row), min(ends[group + 1], end))
            if places is not None and not any(row - part.first_row in places for row in rows):
                yield from ((f"{part.path}#{row}", {}) for row in rows)
                continue
            records = _read_group(file, group, rows.start - ends[group], columns)
            yield from ((f"{part.path}#{row}", record) for row, record in zip(rows, records, strict=False))


def _read_group(file: pq.ParquetFile, group: int, skip: int, columns: set[str]) -> Iterator[dict[str, Any]]:
    """The rows of a row group, from the row `skip` on."""
    for batch in file.iter_batches(READ_ROWS, [group], columns=sorted(columns)):
        yield from batch.slice(min(skip, batch.num_rows)).to_pylist()
        skip -= min(skip, batch.num_rows)


def plan_jsonl(
    folder: Path, names: Sequence[str], rows_per_part: int, existing: Sequence[Part] = ()
) -> Iterator[dict[str, Any]]:
    for name in names:
        with (folder / name).open("rb") as file:
            first_row = 0
            if parts := [part for part in existing if part.path == name]:
                first_row = parts[-1].first_row + sum(1 for _ in _read_part(file, parts[-1]))
            while lines := list(itertools.islice(_lines(file), rows_per_part)):
                yield {
                    "path": name,
                    "first_row": first_row,
                    "num_rows": len(lines),
                    "offset": lines[0][0],
                    "digest": _digest(line for _, line in lines),
                }
                first_row += len(lines)


def find_unchanged_parts(folder: Path, name: str, parts: Sequence[Part]) -> list[Part]:
    """The first parts of a JSONL file whose lines are as they were when the parts were planned."""
    with (folder / name).open("rb") as file:
        return list(itertools.takewhile(lambda part: _digest(_read_part(file, part)) == part.digest, parts))


def _read_part(file: BinaryIO, part: Part) -> Iterator[bytes]:
    file.seek(part.offset)
    return (line for _, line in itertools.islice(_lines(file), part.num_rows))


def _digest(lines: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.rstrip() + b"\n")  # the last line may get its line break later
    return digest.hexdigest()


def read_jsonl(folder: Path, part: Part, columns: set[str], places: Places = None) -> Iterator[Record]:
    with (folder / part.path).open("rb") as file:
        for place, line in enumerate(_read_part(file, part)):
            is_wanted = places is None or place in places
            yield f"{part.path}#{part.first_row + place}", _parse(line) if is_wanted else {}


def find_jsonl_columns(folder: Path, names: Sequence[str], wanted: set[str]) -> set[str]:
    """Names of the columns in the rows, read until all wanted ones are found."""
    found: set[str] = set()
    for name in names:
        with (folder / name).open("rb") as file:
            for _, line in _lines(file):
                record = _parse(line)
                found |= record.keys() if isinstance(record, Mapping) else set()
                if wanted <= found:
                    return found
    return found


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that is not blank. A line over the limit is cut after the limit."""
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
        return MediaTooLarge(f"line of more than {MAX_ROW_BYTES} bytes; allowed: up to {MAX_ROW_BYTES}")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return InvalidRequest(f"the line is not valid JSON: {error}")
    return record if isinstance(record, dict) else InvalidRequest("the line is not a JSON object")


def plan_tar(
    folder: Path, names: Sequence[str], rows_per_part: int, existing: Sequence[Part] = ()
) -> Iterator[dict[str, Any]]:
    return ({"path": name} for name in names)


def read_tar(folder: Path, part: Part, columns: set[str], places: Places = None) -> Iterator[Record]:
    """WebDataset: consecutive members whose names are equal up to the first dot are one row.

    The rest of the name is the member's column. A member also is the column `text`, `image` or `video`, by its suffix,
    if it is the first of its row.
    """
    with tarfile.open(folder / part.path) as tar:
        files = (member for member in tar if member.isreg())
        rows = itertools.groupby(files, lambda member: _split(member.name)[0])
        for place, (key, members) in enumerate(rows):
            record: dict[str, Any] = {}
            too_large: EmbedderError | None = None
            is_wanted = places is None or place in places
            for member in members if is_wanted else ():
                extension = _split(member.name)[1]
                wanted = {extension, MEMBER_COLUMNS.get(f".{extension}", "")} & columns - set(record)
                if wanted and member.size > MAX_ROW_BYTES:
                    too_large = MediaTooLarge(f"member of {member.size} bytes; allowed: up to {MAX_ROW_BYTES}")
                elif wanted:
                    opened = tar.extractfile(member)
                    assert opened is not None  # a regular file
                    record |= dict.fromkeys(wanted, opened.read())
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member it has read
            yield key, too_large or record | {"__key__": key}


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension.lower()


def plan_folder(
    folder: Path, names: Sequence[str], rows_per_part: int, existing: Sequence[Part] = ()
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(names), rows_per_part):
        part_names = tuple(names[start : start + rows_per_part])
        yield {"names": part_names, "num_rows": len(part_names)}


def read_folder(folder: Path, part: Part, columns: set[str], places: Places = None) -> Iterator[Record]:
    """Each picture, clip or segment, and page of a document is a row. Its path is the row's name and column `image`."""
    return ((name, {"image": name}) for name in part.names)


PARQUET = Format((".parquet",), plan_parquet, read_parquet)
JSONL = Format((".jsonl", ".ndjson"), plan_jsonl, read_jsonl)
TAR = Format((".tar",), plan_tar, read_tar)
FOLDER = Format((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *DOCUMENT_SUFFIXES, *OFFICE_SUFFIXES), plan_folder, read_folder)
