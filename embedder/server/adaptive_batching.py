"""BentoML's adaptive-batching APIs over the engine, which decides by itself what runs together.

BentoML gathers the rows of several requests into one list, calls the API once, and cuts the result into one slice for
each request. Only then are the rows computed: in the request's own context, so that its id, deadline and errors are its
own, and its rows go to the engine's queue like those of any other route.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any, SupportsIndex

from bentoml.exceptions import BentoMLException
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embedder.errors import RequestTooLarge
from embedder.server.bento_app import raised_response
from embedder.settings import Settings

Respond = Callable[[Sequence[Any], Receive], Awaitable[Response]]  # the rows of one request to their results


class TooManyRows(BentoMLException):
    """`RequestTooLarge`, as an exception that BentoML answers with 413."""

    error_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def check_rows(rows: list[Any], settings: Settings) -> list[Any]:
    """The rows of one request. Raises `TooManyRows`."""
    from embedder.http.request_body import check_item_count  # the parent process imports this module only

    try:
        check_item_count(len(rows), settings)
    except RequestTooLarge as error:
        raise TooManyRows(error.message) from error
    return rows


def refuse_extra_fields(api: Any) -> None:
    """Make a BentoML API refuse unknown fields in its body; the model that BentoML derives ignores them."""
    fields: type[BaseModel] = api.input_spec
    fields.model_config["extra"] = "forbid"
    fields.model_rebuild(force=True)


class GatheredRows(list[Any]):
    """The rows of several requests. Each slice that BentoML cuts is a request's response."""

    def __init__(self, rows: Iterable[Any], respond: Respond) -> None:
        super().__init__(rows)
        self._respond = respond

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        rows = super().__getitem__(key)
        return RowsResponse(rows, self._respond) if isinstance(key, slice) else rows


class RowsResponse(Response):
    """The results of one request's rows, computed when the response is sent."""

    def __init__(self, rows: Sequence[Any], respond: Respond) -> None:
        super().__init__()
        self._rows = rows
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._respond(self._rows, receive)
        except Exception as error:  # must not pass through BentoML's middlewares, where the caller would hang
            for message in raised_response(error):
                await send(message)
        else:
            response.background = self.background
            await response(scope, receive, send)
