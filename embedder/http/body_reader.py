"""Reads request bodies into the requests of their dialects: small ones in the event loop, the others in a thread.

The largest body that is accepted takes 0.3 s to read (2-core CPU), in which the event loop would answer nobody. A
thread gives up the interpreter every 5 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from embedder.errors import EmbedderError
from embedder.http.dialects.dialect import Dialect, Upload, choose_dialect
from embedder.http.request_body import read_json
from embedder.http.uploads import is_upload, upload_fields
from embedder.settings import Settings

READ_AT_ONCE_BYTES = 2**14  # a body up to this size is read in the event loop, in about 10 ms at most

_Read = TypeVar("_Read")


class BodyReader:
    """Reads the bodies of the routes of one worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "read-body")  # one: several would have turns before the event loop has one

    async def read(self, dialects: Sequence[Dialect[Any]], request: Request) -> tuple[Dialect[Any], Any]:
        """The dialect of a request, and what it makes of the body. Raises the dialect's errors, in its form."""
        body = (await request.receive())["body"]  # the guard has read all of it
        upload = dialects[0].upload
        if upload and is_upload(request.headers.get("content-type", "")):
            with InFormOf(dialects[0]):
                return dialects[0], await self._read_upload(upload, request, body)
        options = upload.options(request.query_params) if upload and request.query_params else {}
        return await self.run(body, partial(self._read_json, dialects, options, body))

    async def run(self, body: bytes, read: Callable[[], _Read]) -> _Read:
        """Call `read`, which reads the body."""
        if len(body) <= READ_AT_ONCE_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._thread, read)

    def _read_json(
        self, dialects: Sequence[Dialect[Any]], options: Mapping[str, Any], body: bytes
    ) -> tuple[Dialect[Any], Any]:
        fields = {**options, **read_json(body)}
        dialect = choose_dialect(dialects, fields)
        with InFormOf(dialect):
            return dialect, dialect.parse(fields, self._settings)

    async def _read_upload(self, upload: Upload[Any], request: Request, body: bytes) -> Any:
        values = await upload_fields(
            request.headers["content-type"],
            body,
            request.scope.get("query_string", b"").decode("latin-1"),
            name=upload.name,
            max_items=self._settings.max_items_per_request,
        )
        return upload.parse(values, self._settings)


class InFormOf:
    """Gives errors that are raised in the block the form that the dialect has for them."""

    def __init__(self, dialect: Dialect[Any]) -> None:
        self._form = dialect.errors

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, EmbedderError):
            error.render = self._form.render if self._form else None
