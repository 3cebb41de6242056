"""Connections without a complete request, or with an unread response, are closed and do not block others."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from embedder.server import connection_limits
from embedder.server.connection import MAX_HEAD_BYTES, bound_connections
from embedder.server.connection_limits import COSTLY_SHARE, Turns

MAX_WAIT_S = 1.0
SWEEP_S = 0.1
PIECE = b"y" * 2**16
ANSWER = b"z" * 2**24  # more than the kernel buffers


H2C = b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nupgrade: h2c\r\n"
WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
LENGTH = b"content-length: 5\r\n\r\nhello"
CHUNKS = b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
CHUNKS_HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
UNSUPPORTED = "unsupported_transfer_coding"


class App:
    """Returns the length of a body, after `ANSWER` twice on /large; on /wait, when it may; on /early, before the body.

    `num_running`: requests in progress. `scope`: of the last request.
    """

    def __init__(self) -> None:
        self.num_running = self.max_running = 0
        self.scope: Scope = {}
        self.is_waiting, self.may_respond = threading.Event(), threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_running += 1
        self.max_running = max(self.num_running, self.max_running)
        try:
            await self._respond(scope, receive, send)
        finally:
            self.num_running -= 1

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes, more_body = 0, scope["path"] != "/early"
        while more_body:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            more_body = message.get("more_body", False)
        self.scope = scope
        if scope["path"] == "/wait":
            self.is_waiting.set()
            disconnect = asyncio.ensure_future(receive())
            while not self.may_respond.is_set() and not disconnect.done():
                await asyncio.sleep(0.01)
            disconnect.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):  # the second waits until the first is read
            body = ANSWER if scope["path"] == "/large" else b""
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": str(num_bytes).encode()})


def serve(app: Any, **limits: Any) -> Iterator[int]:
    """Run a server of the app, and yield its port."""
    config = uvicorn.Config(app, port=0, http="httptools", lifespan="off", log_level="critical")
    config.load()
    bound_connections(config, MAX_WAIT_S, **limits)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module", autouse=True)
def sweeps() -> Iterator[None]:
    """Limits are checked more often than in the service, so that tests wait less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_limits, "SWEEP_S", SWEEP_S)
        yield


@pytest.fixture(scope="module")
def app() -> App:
    return App()


@pytest.fixture(autouse=True)
def waits(app: App) -> None:
    """Requests to /wait wait until the test lets them respond."""
    app.is_waiting.clear()
    app.may_respond.clear()


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    yield from serve(app)


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


def test_uvicorn_neither_prepares_log_lines_nor_trusts_forwarded_headers(
    app: App, connection: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "uvicorn.access"):
        connection.sendall(b"GET / HTTP/1.1\r\nx-forwarded-proto: https\r\nx-forwarded-for: 1.2.3.4\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert not caplog.records
    assert (app.scope["scheme"], app.scope["client"]) == ("http", connection.getsockname())


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


def answer_to(port: int, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the response to raw bytes, after which the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        fields = json.loads(response.read())
        assert response.headers["connection"] == "close"
        assert response.headers["content-type"] == "application/json"
        assert connection.recv(1) == b""
        return response.status, fields["error"]


@pytest.mark.parametrize("num_bytes", [MAX_HEAD_BYTES - 200, MAX_HEAD_BYTES, 100_000])
@pytest.mark.parametrize("kind", ["header", "headers"])
def test_head_may_have_64_kilobytes_and_not_one_more(num_bytes: int, kind: str, port: int) -> None:
    start, end = b"GET / HTTP/1.1\r\nx: ", b"\r\n"
    if kind == "headers":
        start, end = b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 990 + b"\r\n", b"\r\n"
        head = start[:16] + start[16:] * (num_bytes // 1000) + b"z: "
        head += b"z" * (num_bytes - len(head) - 4) + b"\r\n\r\n"
    else:
        head = start + b"y" * (num_bytes - len(start + end) - 2) + end + b"\r\n"
    assert len(head) == num_bytes
    if num_bytes <= MAX_HEAD_BYTES:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head)
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    else:
        status, error = answer_to(port, head)
        assert (status, error["code"]) == (431, "head_too_large")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 300 + b"\r\n", 431, "head_too_large"),
        (b"nonsense\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\na b: c\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\nhost: a\n\n", 400, "invalid_request"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400, "invalid_request"),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nx\r\n", 400, "invalid_request"),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 501, UNSUPPORTED),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n", 501, UNSUPPORTED),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: identity, chunked\r\n\r\n", 501, UNSUPPORTED),
    ],
)
def test_request_that_is_not_http_gets_the_one_error_body(data: bytes, status: int, code: str, port: int) -> None:
    found, error = answer_to(port, data)
    assert (found, error["code"], error["item"]) == (status, code, None)


MANY = 60_000


@pytest.mark.parametrize(
    ("head", "is_accepted"),
    [
        (b"GET /?" + b"a" * 8000 + b" HTTP/1.1\r\n", True),
        (b"GET /?" + b"a" * 8200 + b" HTTP/1.1\r\n", False),
        (b"GET /" + b"%41" * 3000 + b" HTTP/1.1\r\n", False),
        (b"GET / HTTP/1.1\r\naccept-encoding: " + b"gzip, " * 80 + b"\r\n", True),
        (b"GET / HTTP/1.1\r\nAccept-Encoding: " + b"," * MANY + b"\r\n", False),
        (b"GET / HTTP/1.1\r\n" + b"accept-encoding: gzip, br, x\r\n" * 60, False),
        (b"POST / HTTP/1.1\r\ncontent-type: application/json" + b";" * MANY + b"\r\n", False),
        (b"POST / HTTP/1.1\r\ncontent-encoding: " + b"gzip," * 10_000 + b"\r\n", False),
        (b"GET / HTTP/1.1\r\nrange: bytes=" + b"0-1," * 10_000 + b"\r\n", False),
        (b"GET / HTTP/1.1\r\ncookie: " + b";" * MANY + b"\r\n", True),  # nothing reads it
    ],
    ids=range(10),
)
def test_values_that_are_taken_apart_are_limited(head: bytes, is_accepted: bool, port: int) -> None:
    """Each would take milliseconds of the event loop, before any key is checked."""
    if is_accepted:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head + b"\r\n")
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    else:
        status, error = answer_to(port, head + b"\r\n")
        assert (status, error["code"]) == (431, "head_too_large")
        assert "allowed: " in error["message"]


def test_error_arrives_while_the_caller_still_sends(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        for _ in range(10):
            connection.sendall(PIECE)
            time.sleep(0.01)
        assert connection.recv(12) == b"HTTP/1.1 400"


IDLE = {
    "nothing": (),
    "half a head": (b"GET / HT",),
    "line end before a head": (b"\r\n",),
    "line end after a response": (b"GET / HTTP/1.1\r\n\r\n", b"\r\n"),
    "head after a response": (b"GET / HTTP/1.1\r\n\r\n", b"GET / HT"),
    "body that the app does not read": (b"GET /early HTTP/1.1\r\ncontent-length: 1000\r\n\r\n", b"x"),
    "chunks that the app does not read": (b"GET /early HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "body that does not end": (b"POST / HTTP/1.1\r\ncontent-length: 1000\r\n\r\nx",),
    "trailer that does not end": (b"GET /early HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: b\r\n",),
    "websocket, then bytes": (b"GET / HTTP/1.1\r\n" + WEBSOCKET + b"\r\n", b"xxxx"),
    "CONNECT, then bytes": (b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"xxxx"),
}


def test_every_idle_connection_is_closed(port: int) -> None:
    """All at once, because each takes some multiple of the limit."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in IDLE]
        for step in range(2):
            for connection, parts in zip(connections, IDLE.values(), strict=True):
                if len(parts) > step:
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(parts[step])
            time.sleep(0.3)
        for connection in connections:
            assert is_closed(connection)


def test_connection_with_trickling_bytes_is_closed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection, contextlib.suppress(ConnectionError):
        for _ in range(200):
            connection.sendall(b"\r\n")
            connection.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                assert connection.recv(1) == b""
                return
        raise AssertionError("still open after 20 s")


def test_pipelined_requests_wait_unparsed(port: int, app: App) -> None:
    num_requests = 100
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\n\r\n" + b"GET / HTTP/1.1\r\n\r\n" * num_requests)
        assert app.is_waiting.wait(10)
        assert ask(port) == b"0"
        assert app.num_running == 1
        app.max_running = 1
        app.may_respond.set()
        received = b""
        while received.count(b"HTTP/1.1 200") < num_requests + 1:
            received += connection.recv(2**16)
        assert app.max_running == 1


@pytest.mark.parametrize("body", [b"", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"], ids=len)
def test_caller_that_sends_nothing_more_gets_its_responses(body: bytes, port: int) -> None:
    content = {b"": b"", b"c": b"hello", b"t": b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"}[body[:1]]
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall((b"POST / HTTP/1.1\r\n" + body + b"\r\n" + content) * 3)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(2**16):
            received += data
    assert received.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "half-closed"])
def test_caller_that_is_gone_is_told_from_one_that_only_sends_no_more(
    closes: bool, connection: socket.socket, app: App
) -> None:
    connection.sendall(b"GET /wait HTTP/1.1\r\n\r\n")
    assert app.is_waiting.wait(10)
    if closes:
        connection.close()
        deadline = time.monotonic() + 10
        while app.num_running and time.monotonic() < deadline:
            time.sleep(0.02)
        assert app.num_running == 0
        return
    connection.shutdown(socket.SHUT_WR)
    time.sleep(1)
    assert app.num_running == 1
    app.may_respond.set()
    response = http.client.HTTPResponse(connection)
    response.begin()  # skips the interim response
    assert response.status == 200
    response.close()


@pytest.mark.parametrize("piece_bytes", [1, 40, 10_000])
def test_trailers_are_dropped(piece_bytes: int, port: int, app: App) -> None:
    data = CHUNKS_HEAD + b"0\r\nx-api-key: k\r\nx-request-id: from-trailer\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        for start in range(0, len(data), piece_bytes):
            connection.sendall(data[start : start + piece_bytes])
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    assert app.scope["headers"] == [(b"host", b"a"), (b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize("content", [b"1\r\n \r\n" * 100_000, b"%x\r\n%s\r\n" % (20_000, b"\r\n\r\n" * 5_000)])
def test_costly_bodies_arrive_whole_and_wait_for_each_other(content: bytes, port: int) -> None:
    """Bodies in tiny chunks, and bodies full of what could be the end of one."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(2)]
        for connection in connections:
            sending = threading.Thread(target=connection.sendall, args=(CHUNKS_HEAD + content + b"0\r\n\r\n",))
            sending.start()
            stack.callback(sending.join)
        for connection in connections:
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.read() == (b"100000" if content.startswith(b"1\r") else b"20000")


@pytest.mark.slow
def test_fast_senders_let_others_be_read(port: int) -> None:
    """libuv reads a socket up to 32 times in a row: next to four such bodies, a request took 1.2 s at the median."""
    block = (b"1;a=" + b"b" * 200 + b"\r\n \r\n") * 5000
    is_over = threading.Event()

    def send() -> None:
        with socket.create_connection(("127.0.0.1", port), 30) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(CHUNKS_HEAD)
            while not is_over.is_set():
                connection.sendall(block)

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    seconds = []
    for _ in range(11):
        begin_s = time.perf_counter()
        assert ask(port) == b"0"
        seconds.append(time.perf_counter() - begin_s)
    is_over.set()
    for sender in senders:
        sender.join()
    assert statistics.median(seconds) < 0.4


def test_turns_leave_most_of_the_time_to_others() -> None:
    """Each turn takes a millisecond here; in 5 times that time, others can run."""

    class Costly:
        num_turns = 0

        def take_turn(self) -> float:
            self.num_turns += 1
            end_s = time.perf_counter() + 0.005
            while time.perf_counter() < end_s:
                pass
            turns.wait(self)  # type: ignore[arg-type]  # all that turns use
            return 0.0

    turns, connections = Turns(), [Costly() for _ in range(10)]

    async def run() -> float:
        begin_s = time.perf_counter()
        for connection in connections:
            turns.wait(connection)  # type: ignore[arg-type]
        while connections[-1].num_turns < 2:
            await asyncio.sleep(0)
        return time.perf_counter() - begin_s

    assert asyncio.run(run()) > 11 * 0.005 / COSTLY_SHARE * 0.9
    assert max(one.num_turns for one in connections) <= 3


def test_idle_connections_give_way_to_new_ones(app: App, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.contextmanager(serve)(app, max_connections=10) as port, contextlib.ExitStack() as stack:
        served = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        served.sendall(b"GET /wait HTTP/1.1\r\n\r\n")
        assert app.is_waiting.wait(10)
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(9)]
        for connection in idle:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        time.sleep(2 * SWEEP_S + 0.1)
        assert ask(port) == b"0"  # instead of the longest idle
        assert is_closed(idle[0])
        app.may_respond.set()
        assert served.recv(15) == b"HTTP/1.1 200 OK"
    assert "10 connections are open, the most that the limit on open files" in caplog.text


def test_connection_too_many_gets_an_error_if_none_is_idle(app: App) -> None:
    with contextlib.contextmanager(serve)(app, max_connections=8) as port, contextlib.ExitStack() as stack:
        served = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(8)]
        for connection in served:
            connection.sendall(b"GET /wait HTTP/1.1\r\n\r\n")
        while app.num_running < 8:
            time.sleep(0.01)
        time.sleep(2 * SWEEP_S)
        status, error = answer_to(port, b"")
        assert (status, error["code"]) == (429, "overloaded")
        app.may_respond.set()
        for connection in served:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nhost:"])
def test_connection_without_a_request_is_closed_after_the_limit(start: bytes, port: int) -> None:
    begin_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(start)
        assert is_closed(connection)
    assert time.monotonic() - begin_s >= MAX_WAIT_S


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
    for _ in range(2):
        connection.request("POST", "/", PIECE)
        assert connection.getresponse().read() == str(len(PIECE)).encode()
        time.sleep(MAX_WAIT_S + 0.2)  # uvicorn limits idle time
    connection.close()


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
