"""Connections without a complete request, or with an unread response, are closed and do not block others."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from embedder.server.connection import MAX_HEAD_BYTES, bound_connections

MAX_WAIT_S = 1.0
PIECE = b"y" * 2**16
ANSWER = b"z" * 2**24  # more than the kernel buffers


class App:
    """Returns the length of a body, after `ANSWER` twice on /large. `num_running`: requests in progress."""

    def __init__(self) -> None:
        self.num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_running += 1
        num_bytes, more_body = 0, True
        while more_body:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            more_body = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):  # the second waits until the first is read
            body = ANSWER if scope["path"] == "/large" else b""
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": str(num_bytes).encode()})
        self.num_running -= 1


@pytest.fixture(scope="module")
def app() -> App:
    return App()


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    config = uvicorn.Config(app, port=0, http="httptools", lifespan="off", log_level="critical")
    config.load()
    bound_connections(config, MAX_WAIT_S)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connected:
        yield connected


def is_closed(connection: socket.socket) -> bool:
    """Read until the server closes the connection; raises `TimeoutError` if it does not."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(2**16):
            pass
    return True


def ask(port: int, body: bytes | Iterator[bytes] = b"") -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/", body, encode_chunked=not isinstance(body, bytes))
    answer = connection.getresponse().read()
    connection.close()
    return answer


@pytest.mark.parametrize(
    "start",
    [
        b"GET /?",
        b"GET / HTTP/1.1\r\nx: ",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nx: ",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2;",
        b"GET / HTTP/1.1\r\n\r\nGET /?",
    ],
    ids=["address", "header", "trailer", "chunk extension", "second address"],
)
def test_endless_head_closes_its_connection(start: bytes, connection: socket.socket, port: int) -> None:
    num_bytes = 0
    connection.sendall(start)
    with contextlib.suppress(ConnectionError):
        while num_bytes < 2**27:
            connection.sendall(PIECE)
            num_bytes += len(PIECE)
    assert num_bytes < 2**24  # what the kernel buffers
    assert ask(port) == b"0"


class Transport(asyncio.Transport):
    """Stores what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


def test_too_large_a_head_gets_a_400(app: App) -> None:
    """Without a socket: one that is closed while data arrives may lose the response."""

    async def run() -> Transport:
        config = uvicorn.Config(app, http="httptools", lifespan="off")
        config.load()
        bound_connections(config, MAX_WAIT_S)
        connection, transport = config.http_protocol_class(config, ServerState(), {}), Transport()
        connection.connection_made(transport)
        for data in (b"GET /?", b"y" * MAX_HEAD_BYTES):
            connection.data_received(data)
            assert not transport.is_closed
        connection.data_received(b"y")
        return transport

    transport = asyncio.run(run())
    assert transport.is_closed
    assert transport.written.startswith(b"HTTP/1.1 400 ")
    assert transport.written.endswith(b"The head of the request is too large.")


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nhost:"])
def test_connection_without_a_request_is_closed_after_the_limit(start: bytes, connection: socket.socket) -> None:
    begin_s = time.monotonic()
    connection.sendall(start)
    assert is_closed(connection)
    assert MAX_WAIT_S - 0.1 < time.monotonic() - begin_s < MAX_WAIT_S + 2


def test_request_ends_if_its_response_is_not_read(connection: socket.socket, app: App) -> None:
    connection.sendall(b"GET /large HTTP/1.1\r\n\r\n")
    assert connection.recv(1) == b"H"
    assert app.num_running == 1
    deadline = time.monotonic() + MAX_WAIT_S + 5
    while app.num_running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert app.num_running == 0
    assert is_closed(connection)


def test_response_that_is_read_arrives_whole(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/large")
    assert len(connection.getresponse().read()) == 2 * len(ANSWER) + 1
    connection.close()


def test_bodies_may_be_larger_and_slower_than_heads(port: int) -> None:
    def slowly() -> Iterator[bytes]:
        for _ in range(3):
            time.sleep(MAX_WAIT_S / 2)
            yield b"ab"

    assert ask(port, PIECE * 20) == str(20 * len(PIECE)).encode()
    assert ask(port, slowly()) == b"6"


def test_connection_is_kept_for_the_next_request(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for _ in range(3):
        connection.request("POST", "/", PIECE)
        assert connection.getresponse().read() == str(len(PIECE)).encode()
        time.sleep(MAX_WAIT_S + 0.2)  # uvicorn limits idle time
    connection.close()


H2C = b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nupgrade: h2c\r\n"
WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
LENGTH = b"content-length: 5\r\n\r\nhello"
CHUNKS = b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("piece_bytes", [1, 150, 10_000])
@pytest.mark.parametrize("body", [LENGTH, CHUNKS], ids=["length", "chunks"])
def test_offer_of_another_protocol_is_ignored(
    offer: bytes, piece_bytes: int, body: bytes, connection: socket.socket
) -> None:
    """Every stock JDK client offers h2c with its first request, and reuses the connection."""
    head = b"POST / HTTP/1.1\r\nhost: a\r\n"
    requests = head + offer + body + head + body + b"GET / HTTP/1.1\r\n" + offer + b"\r\n"
    for start in range(0, len(requests), piece_bytes):
        connection.sendall(requests[start : start + piece_bytes])
    received = b""
    while received.count(b"0\r\n\r\n") < 3:
        received += connection.recv(2**16)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert re.findall(rb"\r\n1\r\n(\d)\r\n0\r\n\r\n", received) == [b"5", b"5", b"0"]


def test_idle_connections_are_kept_longer_than_a_load_balancer_keeps_them() -> None:
    config = uvicorn.Config(App(), http="httptools", lifespan="off")
    config.load()
    bound_connections(config, MAX_WAIT_S)
    assert config.timeout_keep_alive > 60
