"""uvicorn's HTTP protocol with limits on the head of a request and on the time that a response stays unread.

uvicorn 0.54 bounds neither the size of a request's head nor the time until it is complete, and it copies the URL
again for every piece that arrives: a URL of 142 MB, sent without a key, stopped the event loop for 14 s.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16  # in addition to what one read of the socket returns
KEEP_ALIVE_S = 75  # load balancers and pooled clients mostly keep idle connections for 60 s

_FRAMING = (b"content-length", b"transfer-encoding")


def bound_connections(config: Config, max_wait_s: float) -> None:
    """Limit the connections of a server that does not accept any yet. `max_wait_s`: for a head, and for reading."""
    config.timeout_keep_alive = KEEP_ALIVE_S
    config.ws_protocol_class = None  # there are no websocket routes
    config.http_protocol_class = partial(BoundedProtocol, max_wait_s=max_wait_s)  # type: ignore[assignment]  # a maker


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It is closed when a head, or the reading of a response, takes longer than `max_wait_s`."""

    def __init__(self, *arguments: Any, max_wait_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._max_wait_s = max_wait_s
        self._num_bytes = 0  # received since the last byte of a body
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self.parser = _IgnoresUpgrades(self.parser, self)  # type: ignore[assignment]  # behaves as one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head_timer)
        _stop(self._unread_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("The head of the request is too large.")
            else:  # after the body, before the response
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
        if not self.parser.should_upgrade():  # otherwise the body follows, through another parser
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self._abort_later()

    def resume_writing(self) -> None:
        _stop(self._unread_timer)
        super().resume_writing()

    def _abort_later(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self._max_wait_s, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()


class _IgnoresUpgrades:
    """httptools' request parser for a connection that stays HTTP/1.1.

    Every JDK HttpClient, and `curl --http2`, offers `Upgrade: h2c` with its first request. A server may ignore the
    offer (RFC 9110, section 7.8), but httptools 0.9 treats everything after the head as the other protocol, and the
    body is lost. Here a new parser, which gets only the framing headers, reads what follows such a head.
    """

    def __init__(self, parser: httptools.HttpRequestParser, protocol: BoundedProtocol) -> None:
        self._parser = parser
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        """Parse more bytes. Raises `HttpParserError`, and never `HttpParserUpgrade`."""
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(_AfterHead(self._protocol))
                framing = [name + b": " + value for name, value in self._protocol.headers if name in _FRAMING]
                self._parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"\r\n"]))
            else:
                return


class _AfterHead:
    """Callbacks of the new parser: the protocol's, except for the first head, which the protocol has seen."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol
        self._has_seen_head = False

    def on_message_begin(self) -> None:
        if self._has_seen_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._has_seen_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_seen_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._has_seen_head:
            self._protocol.on_headers_complete()
        self._has_seen_head = True

    def on_body(self, body: bytes) -> None:
        self._protocol.on_body(body)

    def on_message_complete(self) -> None:
        self._protocol.on_message_complete()
