"""Images sent as files: in a form (`multipart/form-data`), or as a body that is the image itself.

They become the fields that a JSON body would have, with bytes instead of base64. Text fields of the form are options,
and so are parameters of the URL that the form does not have. python-multipart parses the form. The number of parts is
checked before that, because the parser holds the GIL for 2 microseconds per boundary (2-core CPU, python-multipart
0.0.34).
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from embedder.errors import InvalidRequest, RequestTooLarge, counted

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORM, BYTES = "multipart/form-data", "application/octet-stream"
TYPES = (FORM, BYTES, "image/*")
MAX_OPTIONS = 50  # parts of a form, in addition to the images
MAX_HEADERS, MAX_HEADER_BYTES = 8, 4096  # of a part
INLINE_BYTES = 2**12  # a larger form is parsed in a thread: 64 KiB of small parts take 9 ms
_THREAD = ThreadPoolExecutor(1, "read-form")  # one, as for other bodies

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs each malformed form as a warning


def is_upload(content_type: str) -> bool:
    """Whether a body of this type is a form with files, or a file."""
    named = content_type.partition(";")[0].strip().lower()
    return named in TYPES or named.startswith("image/")


async def upload_fields(
    content_type: str, body: bytes, query: str, *, name: str, max_items: int
) -> dict[str, list[bytes | str]]:
    """The values of each field, in order. `name`: the field of a body that is an image.

    Raises `InvalidRequest` and `RequestTooLarge`.
    """
    options = _Fields()
    for option, text in parse_qsl(query):
        options.add(option, text)
    media_type, _ = parse_options_header(content_type)
    if media_type.decode("latin-1") != FORM:
        return {**options.values, name: [body]}
    allowed = f"{counted(max_items, 'image')} (EMBEDDER_MAX_ITEMS_PER_REQUEST)"
    fields = await _form(content_type, body, max_items, allowed)
    return {**options.values, **fields.values}


async def form_with_file(content_type: str, body: bytes) -> tuple[dict[str, list[bytes | str]], str]:
    """The values of each field of a form, in order, and the name of its last file.

    Raises `InvalidRequest` and `RequestTooLarge`.
    """
    fields = await _form(content_type, body, 1, "one file")
    return fields.values, fields.file_name


async def _form(content_type: str, body: bytes, max_items: int, allowed: str) -> _Fields:
    """The fields of a form with up to `max_items` files, which are `allowed`, in words."""
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if not boundary:
        raise InvalidRequest(f"content type: got {content_type[:60]!r}; allowed: {FORM} with a boundary")
    fields = _Fields()
    arguments = (body, boundary, max_items, allowed, fields)
    if len(body) <= INLINE_BYTES:
        _read_form(*arguments)
    else:
        await asyncio.get_running_loop().run_in_executor(_THREAD, _read_form, *arguments)
    return fields


@dataclass
class _Fields:
    """Values by the name of their field. `file_name`: that of the last file that has one."""

    values: dict[str, list[bytes | str]] = field(default_factory=dict)
    file_name: str = ""

    def add(self, name: str, value: bytes | str) -> None:
        """Add a value. `name[]`, as some libraries call a list, counts as `name`; an empty text as not given."""
        if value != "":
            self.values.setdefault(name.removesuffix("[]"), []).append(value)


def _read_form(body: bytes, boundary: bytes, max_items: int, allowed: str, fields: _Fields) -> None:
    max_parts = max_items + MAX_OPTIONS
    if body.count(b"\r\n--" + boundary) > max_parts:
        raise RequestTooLarge(f"a form of more than {max_parts} parts; allowed: {allowed} and {MAX_OPTIONS} options")
    reader = _PartReader(fields)
    try:
        parser = MultipartParser(
            boundary, reader.callbacks(), max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER_BYTES
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"the body is not a valid form: {error}") from error
    if not reader.is_complete:
        raise InvalidRequest("the body is not a valid form: it is cut off")


class _PartReader:
    """Adds each part of a form to the fields. `is_complete`: the form's end was seen."""

    def __init__(self, fields: _Fields) -> None:
        self._fields = fields
        self._header = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self.is_complete = False

    def callbacks(self) -> MultipartCallbacks:
        """What a parser calls. Not an attribute: in a reference cycle, the reader would keep the form's bytes."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._pieces.append(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end_form,
        }

    def _begin(self) -> None:
        self._headers, self._pieces = {}, []

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_part(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, parameters = parse_options_header(disposition)
        name = _text("the name of a part", parameters.get(b"name", b""))
        if not name:
            raise InvalidRequest(
                f"a part of the form has no name; its header content-disposition is {repr(disposition)[1:60]}"
            )
        coding = self._headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if coding not in (b"binary", b"8bit", b"7bit"):
            raise InvalidRequest(f"{name[:60]}: content-transfer-encoding: got {coding[:60]!r}; allowed: binary")
        content_type = self._headers.get(b"content-type", b"").decode("latin-1")
        is_file = b"filename" in disposition.lower() or is_upload(content_type)
        self._fields.file_name = parameters.get(b"filename", b"").decode("utf-8", "replace") or self._fields.file_name
        data = b"".join(self._pieces)
        self._fields.add(name, data if is_file else _text(name[:60], data))

    def _end_form(self) -> None:
        self.is_complete = True


def _text(what: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{what}: got bytes that are not UTF-8, from {data[error.start : error.start + 8]!r}; allowed: text, or a "
            "file with a file name"
        ) from error
