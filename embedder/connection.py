"""A caller's bytes -> requests: uvicorn's own protocol, with bounds on what comes before a request and stays behind it.

uvicorn 0.54 bounds neither the size of a request's head nor its time, and copies a URL for every piece that comes: one
of 142 MB stopped the event loop for 14 s, without a key. Nor does it bound how long an answer lies unread.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16  # beyond one read of the socket


def bound_connections(config: Config, max_wait_s: float) -> None:
    """Of a server that has not begun to listen: each head is to come, and each answer to be taken, in so long."""
    config.http_protocol_class = partial(BoundedProtocol, max_wait_s=max_wait_s)  # type: ignore[assignment]  # a maker


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, max_wait_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._max_wait_s = max_wait_s
        self._num_bytes = 0  # since the last that were of a body
        self._head_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head_timer)
        _stop(self._answer_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("The head of the request is too large.")
            else:  # behind the body, while the answer is made
                self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_bytes = 0
        _stop(self._head_timer)
        self._head_timer = self._abort_later()

    def on_headers_complete(self) -> None:
        _stop(self._head_timer)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_bytes = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self._abort_later()

    def resume_writing(self) -> None:
        _stop(self._answer_timer)
        super().resume_writing()

    def _abort_later(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self._max_wait_s, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()
