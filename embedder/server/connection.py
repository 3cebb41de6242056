"""uvicorn's HTTP protocol with bounds: one request at a time, and a limit on the size and the time of everything else.

uvicorn 0.54 bounds neither a request's head nor the number of requests that wait in a connection, and several states
of a connection have no timer. Here the parser gets one request at a time; what follows it is held, unparsed, until
the response is sent, and reading pauses meanwhile.
"""

from __future__ import annotations

import asyncio
import socket
import time
from functools import partial
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from embedder.errors import EmbedderError, HeadTooLarge, InvalidRequest, Overloaded, UnsupportedTransferCoding
from embedder.http.response import error_body
from embedder.server.connection_limits import KEEP_ALIVE_S, MAX_HELD_BYTES, ConnectionLimits, State
from embedder.server.joined_writes import JoinedWrites
from embedder.server.upgrade import ignore_upgrade

MAX_HEAD_BYTES = 2**16
MAX_HEAD_LINES = 256
MAX_HELD_PER_CONNECTION = 2**16  # reading pauses above this; one read of the socket can add 256 KiB
MAX_URL_BYTES = 2**13
MAX_PARSED_BYTES = 2**9  # of the headers in `PARSED`, together
# Their values are divided at each comma or semicolon, in the event loop and before a key is checked.
PARSED = frozenset({b"accept-encoding", b"content-type", b"content-encoding", b"range"})
SLICE_BYTES = 2**13  # of a head or a chunked body, parsed at once
TURN_S = 0.001  # of parsing; libuv reads a socket up to 32 times before it looks at another one
REQUEST_S = 0.001  # of the event loop, for a request without work
COSTLY_PIECES = 128  # in a slice: then a chunk has less than 64 bytes on average
MAX_DROPPED_BYTES = 2**21  # received after an error
LISTENS_AFTER_S = 0.25  # until a caller that sends nothing more is asked whether it still listens

_END = b"\r\n\r\n"  # of a head, and of a chunked body with its trailers


def bound_connections(config: Config, max_wait_s: float, max_connections: int | None = None) -> None:
    """Limit the connections of a server that does not accept any yet.

    `max_wait_s`: for a head to arrive, and for a response to be read. `max_connections`: by default as many as
    the limit on open files leaves.
    """
    config.timeout_keep_alive = KEEP_ALIVE_S
    config.ws_protocol_class = None  # there are no websocket routes
    if isinstance(config.loaded_app, ProxyHeadersMiddleware):
        config.loaded_app = config.loaded_app.app  # nothing reads the caller's address or the scheme
    limits = ConnectionLimits(max_wait_s, max_connections)
    config.http_protocol_class = partial(BoundedProtocol, limits=limits)  # type: ignore[assignment]  # a maker


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `ConnectionLimits` closes it when it stays in a state too long."""

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **options: Any) -> None:
        self._pieces: list[bytes] = []  # of a body, in the slice that is parsed
        # Half the time of a method: 16 instead of 34 ns (one core of an AMD EPYC, `python -m benchmarks.micro`).
        self.on_body = self._pieces.append  # type: ignore[assignment,method-assign]
        super().__init__(*arguments, **options)
        self.access_log = False  # `RequestBoundary` writes one; uvicorn would prepare lines that it then drops
        self.limits = limits
        self.epoch = 0
        self.since = (State.HEAD, 0), 0.0
        self._held = b""  # received and not parsed, from `_start` on
        self._start = 0
        self._tail = b""  # the last bytes of the slice before, in which `_END` may have begun
        self._has_head = False  # of the request that is read now
        self._num_head_bytes = self._num_head_lines = 0
        self._num_body_left = 0  # by content-length
        self._num_framing_bytes = 0  # of a chunked body, since the last byte of content
        self._is_costly = self._is_waiting_for_turn = False
        self._spent_s = 0.0  # on parsing, in this iteration of the event loop
        self._num_dropped = 0  # bytes after an error
        self._is_refused = self._is_half_closed = self._was_asked = False

    # The transport's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport, self.loop))
        self.flow = _Flow(transport, self)
        self.limits.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._hold(b"")
        self.limits.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._num_dropped += len(data)
            if self._num_dropped > MAX_DROPPED_BYTES:
                self.transport.close()
            return
        self._hold(self._held[self._start :] + data if self._held else data)
        begin_s = time.perf_counter()
        if not self._spent_s:
            self.loop.call_soon(self._forget_time)
        if not self._is_waiting_for_turn:
            self._parse(begin_s)
        self._spent_s += time.perf_counter() - begin_s

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open if the caller, which sends nothing more, may still wait for a response."""
        self._is_half_closed = True
        if self.scheme == "https" or not (self._is_responding() or self._held):
            return False
        self.loop.call_later(LISTENS_AFTER_S, self._ask_whether_caller_listens)
        return True

    def pause_writing(self) -> None:
        self.epoch += 1
        super().pause_writing()

    # The limits' callbacks

    def state(self) -> State:
        """What this connection waits for."""
        if self.transport.is_closing():
            return State.CLOSING
        if self._is_refused:
            return State.REFUSED
        if self.flow.write_paused:
            return State.UNREAD
        if self.cycle is not None and not self.cycle.response_complete:
            return State.BODY if self._has_head else State.RESPONSE
        if self._has_head:
            return State.REST
        return State.HEAD if self.cycle is None or self._num_head_bytes else State.IDLE

    def end(self, state: State) -> None:
        """Close the connection, which was in this state too long."""
        if state in (State.IDLE, State.HEAD, State.REST, State.REFUSED):
            self.transport.close()
        else:
            self.transport.abort()

    def refuse_for_lack_of_connections(self, *, lingers: bool) -> None:
        """Send an error and close the connection."""
        allowed = self.limits.max_connections
        self._refuse(Overloaded(f"{allowed} connections are open, the most allowed", retry_after_s=1))
        if not lingers:
            self.transport.close()

    def take_turn(self) -> float:
        """Parse for `TURN_S`, and then all that is not costly. Returns `REQUEST_S` if a request is read to its end."""
        self._is_waiting_for_turn = False
        was_responding = self._is_responding()
        end_s = time.perf_counter() + TURN_S
        while self._may_parse() and time.perf_counter() < end_s:
            self._parse_slice()
        self._parse(time.perf_counter())
        return REQUEST_S if self._is_responding() and not was_responding else 0.0

    # Parsing

    @property
    def is_reading_paused(self) -> bool:
        """Whether what was received has to be parsed first."""
        return self._is_waiting_for_turn or len(self._held) - self._start > MAX_HELD_PER_CONNECTION

    def _hold(self, data: bytes) -> None:
        self.limits.held_bytes += len(data) - len(self._held)
        self._held, self._start = data, 0

    def _may_parse(self) -> bool:
        return bool(self._held) and not self._is_responding() and not self.transport.is_closing()

    def _is_responding(self) -> bool:
        """Whether a whole request was read and its response is not complete."""
        return not self._has_head and self.cycle is not None and not self.cycle.response_complete

    def _forget_time(self) -> None:
        self._spent_s = 0.0

    def _parse(self, begin_s: float) -> None:
        """Parse what was received, up to the end of one request. Costly bytes, or very many, wait for their turn."""
        end_s = begin_s + TURN_S - self._spent_s
        while self._may_parse() and not self._is_costly and time.perf_counter() < end_s:
            self._parse_slice()
        is_over = (self._is_costly and self._may_parse()) or time.perf_counter() > end_s
        if is_over and not self._is_waiting_for_turn:
            self._is_waiting_for_turn = True
            self.limits.turns.wait(self)
        if self.transport.is_closing():
            return
        if self._held and self.limits.held_bytes > MAX_HELD_BYTES:
            self.transport.abort()
        elif self.is_reading_paused:
            self.flow.pause_reading()
        elif self.cycle is None or self.cycle.response_complete or len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()
        if self._is_half_closed and not self._held and not self._is_responding():
            self.transport.close()

    def _parse_slice(self) -> None:
        """Parse up to the end of a head or of a body, so that at most one request ends."""
        data, start = self._held, self._start
        stop = self._slice_end()
        self._start = stop
        if not self._has_head and not self._is_head_within_limits(data, start, stop):
            return
        had_head = self._has_head
        try:
            self.parser.feed_data(data if stop - start == len(data) else memoryview(data)[start:stop])
        except httptools.HttpParserUpgrade:
            ignore_upgrade(self)
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"not an HTTP/1.1 request: {error}"))
            return
        self._is_costly = len(self._pieces) > COSTLY_PIECES
        if had_head and not self._num_body_left and not self._pieces:
            self._num_framing_bytes += stop - start
        elif self._pieces:
            self._num_framing_bytes = 0
        self._flush_body()
        if self._has_head and self._num_framing_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"chunk extensions or trailers: over {MAX_HEAD_BYTES} bytes, the limit"))
        elif stop == len(data) and not self._is_refused:
            self._hold(b"")

    def _slice_end(self) -> int:
        data, start = self._held, self._start
        if self._num_body_left:
            stop = min(len(data), start + self._num_body_left)
            self._num_body_left -= stop - start
            return stop
        stop = min(len(data), start + SLICE_BYTES)
        window = self._tail + data[start:stop]
        found = window.find(_END)
        if found >= 0:
            stop = start + found + len(_END) - len(self._tail)
            window = window[: found + len(_END)]
        self._tail = window[1 - len(_END) :]
        return stop

    def _is_head_within_limits(self, data: bytes, start: int, stop: int) -> bool:
        self._num_head_bytes += stop - start
        self._num_head_lines += data.count(b"\n", start, stop)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the request's head is larger than {MAX_HEAD_BYTES} bytes, the limit"))
        elif self._num_head_lines > MAX_HEAD_LINES:
            self._refuse(HeadTooLarge(f"the request's head has more than {MAX_HEAD_LINES} lines, the limit"))
        return not self._is_refused

    def _flush_body(self) -> None:
        """Pass on the pieces of a slice as one."""
        if self._pieces:
            body = b"".join(self._pieces)
            self._pieces.clear()
            super().on_body(body)

    # The parser's callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # a trailer would be taken for a header that a proxy has checked
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_head = True
        self._num_head_bytes = self._num_head_lines = self._num_framing_bytes = 0
        self._tail = b""
        self.epoch += 1
        codings = []
        num_parsed_bytes = 0
        for name, value in self.headers:
            if name == b"content-length":
                self._num_body_left = int(value)
            elif name == b"transfer-encoding":
                codings.append(value.strip().lower())
            elif name in PARSED:
                num_parsed_bytes += len(value)
        if codings and codings != [b"chunked"]:
            given = b", ".join(codings).decode("latin-1")[:60]
            self._refuse(UnsupportedTransferCoding(f"transfer encoding: got {given}; allowed: chunked"))
        elif num_parsed_bytes > MAX_PARSED_BYTES:
            names = b", ".join(sorted(PARSED)).decode()
            self._refuse(HeadTooLarge(f"{names}: got {num_parsed_bytes} bytes together; allowed: {MAX_PARSED_BYTES}"))
        elif len(self.url) > MAX_URL_BYTES:
            self._refuse(HeadTooLarge(f"the URL has {len(self.url)} bytes; allowed: {MAX_URL_BYTES}"))
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # otherwise the body follows, through another parser
            self._flush_body()
            self._has_head = self._is_costly = False
            super().on_message_complete()

    # Responses

    def on_response_complete(self) -> None:
        """Called by uvicorn. Its keep-alive timer and its queue of requests are not used."""
        self.server_state.total_requests += 1
        self.epoch += 1
        if not self.transport.is_closing():
            self._is_costly = bool(self._held)  # few clients send a request before the last response; many can be sent
            self._parse(time.perf_counter())

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn."""
        self._refuse(InvalidRequest(msg))

    def _refuse(self, error: EmbedderError) -> None:
        """Send an error and end the connection, but read on for a while: closing it at once could lose the error."""
        if self._is_refused:
            return
        self._is_refused = True
        self._hold(b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        body = error_body(error)
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _ask_whether_caller_listens(self) -> None:
        """Find out whether a caller has closed the connection or only its half of it: both look the same so far.

        An interim response, which every client of HTTP/1.1 skips, makes the system of a closed one report an error.
        """
        if self.transport.is_closing() or not (self._is_responding() or self._held):
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if not self._was_asked and not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self._was_asked = True
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(LISTENS_AFTER_S, self._ask_whether_caller_listens)


class _Flow(FlowControl):
    """uvicorn's flow control, which does not read on while much is held."""

    def __init__(self, transport: asyncio.Transport, connection: BoundedProtocol) -> None:
        super().__init__(transport)
        self._connection = connection

    def resume_reading(self) -> None:
        if not self._connection.is_reading_paused:
            super().resume_reading()
