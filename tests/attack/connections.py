"""Attacks below HTTP's surface: connections that idle, trickle, pipeline, half-close, or leave."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable

GOOD = b'{"input":"red"}'
POST = b"POST /txt/embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
OFFERS = (
    b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nupgrade: h2c\r\n",
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
)
HEADS = (b"GET / HTTP/1.1\r\n\r\n", b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n", b"OPTIONS * HTTP/1.1\r\n\r\n")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


def open_connection(port: int, *, buffer_bytes: int = 0) -> socket.socket:
    """A connection whose operations take 3 s at most. `buffer_bytes`: of the kernel, for what the service sends."""
    connection = socket.socket()
    if buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(3)
    connection.connect(("127.0.0.1", port))
    return connection


def idle(draw: random.Random, port: int) -> None:
    """Many connections that stop at a random place, for some seconds."""
    head = POST + draw.choice((b"content-length: 1000\r\n", b"transfer-encoding: chunked\r\n", *OFFERS)) + b"\r\n"
    starts = (b"", b"\r\n", head[: draw.randrange(len(head))], head, HEADS[1], HEADS[1] + b"\r\n", HEADS[1] + b"GE")
    with contextlib.ExitStack() as stack:
        for _ in range(draw.randrange(1, 60)):
            connection = stack.enter_context(open_connection(port))
            connection.sendall(draw.choice(starts))
        time.sleep(draw.uniform(0, 3))


def trickle(draw: random.Random, port: int) -> None:
    """A head or a body in pieces of a few bytes."""
    body = b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200
    data = draw.choice((POST + body, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300, b"\r\n" * 500))
    end_s = time.monotonic() + draw.uniform(0.5, 3)
    with open_connection(port) as connection:
        while data and time.monotonic() < end_s:
            size = draw.randrange(1, 9)
            connection.sendall(data[:size])
            data = data[size:]
            time.sleep(0.005)


def pipeline(draw: random.Random, port: int) -> None:
    """Up to 256 kB of request heads at once, on some connections, without reading."""
    data = draw.choice(HEADS) * draw.randrange(1, 14_000)
    with contextlib.ExitStack() as stack:
        for _ in range(draw.randrange(1, 10)):
            connection = stack.enter_context(open_connection(port, buffer_bytes=4096))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(data[: 2**18])
        time.sleep(draw.uniform(0, 2))


def tiny_chunks(draw: random.Random, port: int) -> None:
    """A body in chunks of a few bytes, or full of what could be its end, as fast as it is taken."""
    content = draw.choice((b" " * draw.randrange(1, 9), b"\r\n\r\n" * draw.randrange(1, 2000)))
    extension = b";a=" + b"b" * draw.randrange(200) if draw.random() < 0.3 else b""
    block = (b"%x%s\r\n%s\r\n" % (len(content), extension, content)) * draw.randrange(1, 5000)
    end_s = time.monotonic() + draw.uniform(0.5, 3)
    with open_connection(port) as connection:
        connection.sendall(POST + b"transfer-encoding: chunked\r\n\r\n")
        while time.monotonic() < end_s:
            connection.sendall(block[: 2**20])


def strange_head(draw: random.Random, port: int) -> None:
    """A head that is large, has many lines, or has random bytes in it."""
    kinds = (
        b"GET /?" + b"y" * draw.randrange(200_000) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * draw.randrange(200_000) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * draw.randrange(20_000) + b"\r\n",
        b"GET / HTTP/1.1\r\n" + draw.randbytes(draw.randrange(300)) + b"\r\n\r\n",
        POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n",
        POST + b"transfer-encoding: xchunked\r\ncontent-length: 15\r\n\r\n" + GOOD,
        POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n" + b"f" * draw.randrange(1, 40) + b"\r\n" + GOOD,
        POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
        POST + b"a: b\r\n c: d\r\ncontent-length: 15\r\n\r\n" + GOOD,
        POST + OFFERS[0] + b"content-length: 15\r\n\r\n" + GOOD * draw.randrange(1, 4),
        POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"content-length: 15\r\n\r\n" + GOOD,
        POST + b"transfer-encoding: chunked\r\n\r\nf\r\n" + GOOD + b"\r\n0\r\nx-api-key: k\r\n\r\n",
    )
    with open_connection(port) as connection:
        connection.sendall(draw.choice(kinds))
        connection.recv(2**16)


def slow_reader(draw: random.Random, port: int) -> None:
    """Large responses that are read a few bytes at a time, or not at all."""
    with contextlib.ExitStack() as stack:
        for _ in range(draw.randrange(1, 9)):
            connection = stack.enter_context(open_connection(port, buffer_bytes=4096))
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n")
            for _ in range(draw.randrange(9)):
                connection.recv(draw.randrange(1, 99))
                time.sleep(0.02)
        time.sleep(draw.uniform(0, 2))


def dropped(draw: random.Random, port: int) -> None:
    """Requests whose callers close, reset or half-close the connection at a random place."""
    for _ in range(draw.randrange(1, 30)):
        data = POST + b"content-length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
        with open_connection(port) as connection:
            connection.sendall(data[: draw.choice((20, len(data) - 5, len(data)))])
            time.sleep(draw.choice((0, 0, 0.01)))
            match draw.randrange(3):
                case 0:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                case 1:
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(2**16)


KINDS: tuple[Callable[[random.Random, int], None], ...] = (
    idle,
    trickle,
    pipeline,
    tiny_chunks,
    strange_head,
    slow_reader,
    dropped,
)
