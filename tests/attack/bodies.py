"""Attacks in request bodies: compressed bombs, deep and long JSON, and what the other tests know to be refused."""

from __future__ import annotations

import functools
import gzip
import http.client
import random
import zlib
from collections.abc import Callable, Mapping

import zstandard

from tests.inputs import hostile


def post(port: int, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> int:
    """The status of the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


@functools.cache
def _compressed(coding: str, num_bytes: int, content: bytes) -> bytes:
    whole = content * (num_bytes // len(content))
    match coding:
        case "gzip":
            return gzip.compress(whole, 6)
        case "deflate":
            return zlib.compress(whole)
    return zstandard.compress(whole)


def compressed(draw: random.Random, port: int) -> None:
    """A bomb of up to 128 MB, or many empty members."""
    coding = draw.choice(("gzip", "deflate", "zstd"))
    body = _compressed(coding, draw.choice((2**16, 2**22, 2**27)), draw.choice((b" ", b'"a",', b"[")))
    if draw.random() < 0.2:
        body = _compressed(coding, 1, b" ")[:-1] * draw.randrange(1, 5000)
    post(port, draw.choice(("/txt/embed", "/embed")), body, {"content-encoding": coding})


def refused(draw: random.Random, port: int) -> None:
    """One of the bodies that no route accepts."""
    for _, path, body, headers in draw.sample(_refused(), 10):
        post(port, path, body, headers)


@functools.cache
def _refused() -> list[tuple[str, str, bytes, dict[str, str]]]:
    return [one for one in hostile.bodies() if len(one[2]) < 2**20]


KINDS: tuple[Callable[[random.Random, int], None], ...] = (compressed, refused)
