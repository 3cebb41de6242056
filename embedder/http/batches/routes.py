"""OpenAI's routes for files and batches. Each caller sees the files and batches of its own API key only."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from embedder.engine.callers import CALLER
from embedder.errors import InvalidRequest, StorageFailed, counted
from embedder.http.batches.store import BatchStore
from embedder.http.byte_ranges import correct_range
from embedder.http.request_body import RequestBody, read_json, validate_body
from embedder.http.response import json_response, to_json
from embedder.http.uploads import FORM, form_with_file
from embedder.inputs.items import check_text, describe_value

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FILES_PATH = "/v1/files"
MAX_WINDOW_S = 30 * 86_400
MAX_METADATA, MAX_METADATA_CHARS = 16, 512
_WINDOW = re.compile(r"([1-9]\d{0,3})([hd])")


class BatchBody(RequestBody):
    """Body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] = Field(default_factory=dict)
    output_expires_after: Any = None  # files expire by the operator's setting


class BatchRoutes:
    """`endpoints`: the paths that lines may name. The owner of a file is the caller who has sent it."""

    def __init__(self, store: BatchStore, endpoints: Sequence[str]) -> None:
        self.store = store
        self.endpoints = tuple(endpoints)

    def routes(self) -> list[Route]:
        """All routes."""
        table: list[tuple[str, str, Any]] = [
            ("POST", FILES_PATH, self._add_file),
            ("GET", FILES_PATH, self._list_files),
            ("GET", f"{FILES_PATH}/{{id}}", self._file),
            ("DELETE", f"{FILES_PATH}/{{id}}", self._delete_file),
            ("GET", f"{FILES_PATH}/{{id}}/content", self._content),
            ("POST", "/v1/batches", self._add_batch),
            ("GET", "/v1/batches", self._list_batches),
            ("GET", "/v1/batches/{id}", self._batch),
            ("POST", "/v1/batches/{id}/cancel", self._cancel),
        ]
        paths = dict.fromkeys(path for _, path, _ in table)
        return [
            Route(path, _by_method({method: run for method, other, run in table if other == path}), methods=methods)
            for path in paths
            if (methods := [method for method, other, _ in table if other == path])
        ]

    async def _add_file(self, request: Request) -> Response:
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != FORM:
            raise InvalidRequest(f"content type: got {content_type[:60]!r}; allowed: {FORM} with purpose and file")
        values, name = await form_with_file(content_type, (await request.receive())["body"])
        if repeated := [name for name in ("file", "purpose") if len(values.get(name, ())) > 1]:
            raise InvalidRequest(f"{repeated[0]}: got {len(values[repeated[0]])}; allowed: one")
        content = (values.get("file") or [""])[-1]
        if not isinstance(content, bytes) or not content:
            raise InvalidRequest("file: missing; send a JSON Lines file in the field `file`")
        purpose = (values.get("purpose") or [""])[-1]
        if purpose != "batch":
            raise InvalidRequest(f"purpose: got {describe_value(purpose)}; allowed: batch")
        return await self._respond(self.store.add_file, CALLER.get(), content, name or "file.jsonl")

    async def _list_files(self, request: Request) -> Response:
        records = await _in_thread(self.store.files, CALLER.get())
        purpose = request.query_params.get("purpose")
        chosen = [one for one in records if purpose in (None, one["purpose"])]
        return _page(chosen, request, max_limit=10_000, default_limit=10_000)

    async def _file(self, request: Request) -> Response:
        return await self._respond(self.store.file, CALLER.get(), request.path_params["id"])

    async def _delete_file(self, request: Request) -> Response:
        identifier = request.path_params["id"]
        await _in_thread(self.store.delete_file, CALLER.get(), identifier)
        return json_response(to_json({"id": identifier, "object": "file", "deleted": True}))

    async def _content(self, request: Request) -> Response:
        path = await _in_thread(self.store.content, CALLER.get(), request.path_params["id"])
        status = await _in_thread(path.stat)
        correct_range(request.scope, status.st_size)
        return FileResponse(path, media_type="application/jsonl", stat_result=status)

    async def _add_batch(self, request: Request) -> Response:
        body = validate_body(BatchBody, read_json((await request.receive())["body"]))
        if body.endpoint not in self.endpoints:
            raise InvalidRequest(f"endpoint: got {describe_value(body.endpoint)}; allowed: {', '.join(self.endpoints)}")
        return await self._respond(
            self.store.add_batch,
            CALLER.get(),
            body.input_file_id,
            body.endpoint,
            body.completion_window,
            _seconds(body.completion_window),
            _checked(body.metadata),
        )

    async def _list_batches(self, request: Request) -> Response:
        records = await _in_thread(self.store.batches, CALLER.get())
        return _page(records, request, max_limit=100, default_limit=20)

    async def _batch(self, request: Request) -> Response:
        return await self._respond(self.store.batch, CALLER.get(), request.path_params["id"])

    async def _cancel(self, request: Request) -> Response:
        return await self._respond(self.store.cancel, CALLER.get(), request.path_params["id"])

    @staticmethod
    async def _respond(work: Callable[..., dict[str, Any]], *arguments: Any) -> Response:
        return json_response(to_json(await _in_thread(work, *arguments)))


async def _in_thread(work: Callable[..., Result], *arguments: Any) -> Result:
    """Call a method of the store. Raises its errors, and `StorageFailed` if the disk fails."""
    try:
        return await asyncio.to_thread(work, *arguments)
    except OSError as error:
        logger.error("a request for files or batches failed: %s", error)
        raise StorageFailed(
            "files and batches cannot be read or stored now; the service's log has the reason"
        ) from error


def _by_method(handlers: Mapping[str, Callable[[Request], Any]]) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        response: Response = await handlers[method](request)
        return response

    return handle


def _page(records: Sequence[dict[str, Any]], request: Request, *, max_limit: int, default_limit: int) -> Response:
    """A part of a list, in OpenAI's form, by `limit`, `after` and `order`."""
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order: got {order[:60]!r}; allowed: asc, desc")
    limit = request.query_params.get("limit", str(default_limit))
    if not limit.isascii() or not limit.isdecimal() or len(limit) > 5 or not 1 <= int(limit) <= max_limit:
        raise InvalidRequest(f"limit: got {limit[:60]!r}; allowed: 1 to {max_limit}")
    ordered = list(records) if order == "desc" else list(reversed(records))
    if after := request.query_params.get("after"):
        places = [index for index, one in enumerate(ordered) if one["id"] == after]
        if not places:
            raise InvalidRequest(f"after: got {after[:60]!r}; allowed: an id of the list")
        ordered = ordered[places[0] + 1 :]
    page = ordered[: int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return json_response(to_json({"object": "list", "data": page, "has_more": len(ordered) > len(page), **ends}))


def _seconds(window: str) -> int:
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * {"h": 3600, "d": 86_400}[match[2]] if match else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise InvalidRequest(f"completion_window: got {describe_value(window)}; allowed: such as 24h or 7d, up to 30d")
    return seconds


def _checked(metadata: Mapping[str, str]) -> Mapping[str, str]:
    if len(metadata) > MAX_METADATA or any(
        len(text) > MAX_METADATA_CHARS for pair in metadata.items() for text in pair
    ):
        raise InvalidRequest(
            f"metadata: got {counted(len(metadata), 'pair')}; allowed: {MAX_METADATA} of up to {MAX_METADATA_CHARS} "
            "characters"
        )
    for pair in metadata.items():
        for text in pair:
            check_text("metadata", text)
    return metadata
