"""Reads request bodies into the requests of their dialects: small ones in the event loop, the others in a thread.

The largest body that is accepted takes 0.3 s to parse (2-core CPU). In the event loop, this would block all other
requests. A thread gives up the interpreter when another one has waited for 0.2 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request

from embedder.errors import EmbedderError
from embedder.http.dialects.dialect import Dialect, Upload, choose_dialect
from embedder.http.priority import PRIORITY, read_priority
from embedder.http.request_body import read_json
from embedder.http.uploads import is_upload, upload_fields
from embedder.settings import Settings

READ_AT_ONCE_BYTES = 2**13  # a body up to this size is read in the event loop, in about 10 ms at most

_Read = TypeVar("_Read")


class ReadBody(NamedTuple):
    """A body in its dialect. `parsed`: what the dialect makes of it."""

    dialect: Dialect[Any]
    parsed: Any
    priority: int


class BodyReader:
    """Reads the bodies of the routes of one worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "read-body")  # one: several would have turns before the event loop has one

    async def read(self, dialects: Sequence[Dialect[Any]], request: Request) -> ReadBody:
        """Read the body of a request to a path that has these dialects. Raises the dialect's errors, in its form."""
        body = (await request.receive())["body"]  # the guard has read all of it
        upload = dialects[0].upload
        if upload and is_upload(request.headers.get("content-type", "")):
            with InFormOf(dialects[0]):
                return await self._read_upload(dialects[0], upload, request, body)
        options = upload.options(request.query_params) if upload and request.query_params else {}
        return await self.run(body, partial(self._read_json, dialects, options, body))

    async def run(self, body: bytes, read: Callable[[], _Read]) -> _Read:
        """Call `read`, which reads the body."""
        if len(body) <= READ_AT_ONCE_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._thread, read)

    async def parse(self, dialects: Sequence[Dialect[Any]], fields: Mapping[str, Any]) -> ReadBody:
        """Read a body of any size whose JSON has been read already."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._parse, dialects, fields)

    def _read_json(self, dialects: Sequence[Dialect[Any]], options: Mapping[str, Any], body: bytes) -> ReadBody:
        return self._parse(dialects, {**options, **read_json(body)})

    def _parse(self, dialects: Sequence[Dialect[Any]], fields: Mapping[str, Any]) -> ReadBody:
        dialect = choose_dialect(dialects, fields)
        with InFormOf(dialect):
            priority = read_priority(fields.get(PRIORITY))
            return ReadBody(dialect, dialect.parse(fields, self._settings), priority)

    async def _read_upload(self, dialect: Dialect[Any], upload: Upload[Any], request: Request, body: bytes) -> ReadBody:
        values = await upload_fields(
            request.headers["content-type"],
            body,
            request.scope.get("query_string", b"").decode("latin-1"),
            name=upload.name,
            max_items=self._settings.max_items_per_request,
        )
        texts = [str(text) for text in values.get(PRIORITY, ())]
        priority = read_priority(upload.options({PRIORITY: texts[0]})[PRIORITY] if len(texts) == 1 else texts or None)
        return ReadBody(dialect, upload.parse(values, self._settings), priority)


class InFormOf:
    """Gives errors that are raised in the block the form that the dialect has for them."""

    def __init__(self, dialect: Dialect[Any]) -> None:
        self._form = dialect.errors

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, EmbedderError):
            error.render = self._form.render if self._form else None
