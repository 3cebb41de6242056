"""Attacks in request bodies: bombs, and strings, numbers, structures and forms that cost much for their size."""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.client
import json
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping

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


def compressed_in_chunks(draw: random.Random, port: int) -> None:
    """A compressed body in chunks of random sizes, with pauses, of which the end may be missing."""
    coding = draw.choice(("gzip", "deflate", "zstd"))
    body = _compressed(coding, draw.choice((2**16, 2**24)), draw.choice((b" ", b'"a",', b"[")))
    size = max(1, len(body) // draw.randrange(1, 400))

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body) - draw.choice((0, 0, 10)), size):
            yield body[start : start + size]
            time.sleep(draw.choice((0, 0, 0.001)))

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json", "content-encoding": coding}
        connection.request("POST", "/embed", chunks(), headers, encode_chunked=True)
        connection.getresponse().read()


def structure(draw: random.Random, port: int) -> None:
    """JSON that is deep, wide, or has many or equal keys, or large numbers, at a random place of a request."""
    count = draw.randrange(1, 20_000)
    values = (
        lambda: b"[" * count + b"]" * draw.choice((count, 0)),
        lambda: b'{"a":' * count + b"1" + b"}" * count,
        lambda: b"[" + b"1," * count + b"1]",
        lambda: b"{" + b",".join(b'"%x":1' % draw.getrandbits(64) for _ in range(count)) + b"}",
        lambda: b'{"input":1' + b',"input":1' * count + b"}",
        lambda: b"9" * count * 10,
        lambda: b"-1e%d" % count,
        lambda: b"[" + b",".join([b"9" * draw.randrange(1, 4000)] * (count // 20)) + b"]",
        lambda: b'"' + b"\\ud800\\u0041" * count + b'"',
    )
    value = draw.choice(values)()
    path, before, after = draw.choice(
        (
            ("/txt/embed", b'{"input":', b"}"),
            ("/embed", b'{"items":["red",', b"]}"),
            ("/embed", b'{"items":[{"text":"a","dimensions":', b"}]}"),
            ("/v1/embeddings", b'{"messages":[{"role":"user","content":', b"}]}"),
            ("/v2/embed", b'{"inputs":[{"content":', b"}]}"),
            ("/predict", b'{"instances":["red",', b"]}"),
            ("/predict", b'{"instances":["red"],"parameters":{"dimensions":', b"}}"),
            ("/rerank", b'{"query":"a","documents":', b"}"),
            ("/tokenize", b'{"messages":', b"}"),
            ("/decode", b'{"ids":', b"}"),
            (
                "/v2/models/a/infer",
                b'{"id":"\\ud800","inputs":[{"name":"text","datatype":"BYTES","data":["a"],"shape":',
                b"}]}",
            ),
        )
    )
    post(port, path, before + value + after)


def text(draw: random.Random, port: int) -> None:
    """Texts that could be costly to normalize, split or merge, as long as they may be and longer."""
    unit = draw.choice(
        (
            *(
                "a",
                "ab",
                " ",
                "   \n",
                "\u00a0",
                "a\u0301",
                "\u0301\u0323\u0327",
                "\u0344",
                "\u1100\u1161\u11a8",
                "\ufdfa",
            ),
            *("1", "!", "\U0001f600", "\U0001f468\u200d", "\u6f22", "'s", "\r\n", " x", "<|im_end|>", "\0", "\u202e"),
        )
    )
    unit = unit * draw.randrange(1, 100) + draw.choice(("", "x", "\n"))
    long = (unit * (200_000 // len(unit) + 1))[: draw.choice((512, 513, 20_000, 200_000, 200_001))]
    count = draw.choice((1, 1, 3))
    path, body = draw.choice(
        (
            ("/txt/embed", {"input": [long] * count, "truncate": "none"}),  # cut texts are work as any other
            ("/embed", {"items": [{"text": "a", "instruction": long}] * count}),
            ("/tokenize", {"inputs": [long] * count}),
            ("/tokenize", {"prompt": long, "return_token_strs": True}),
            ("/rerank", {"query": long[:20_000], "documents": [long] * count, "truncate": False}),
        )
    )
    post(port, path, json.dumps(body).encode())


def string(draw: random.Random, port: int) -> None:
    """Data URIs and base64 that could be costly to read."""
    count = draw.randrange(1, 300_000)
    start = draw.choice(
        ("", "data:", "data:image/png;base64,", "data:video/jpeg;base64,", "data:video/mp4;base64,", "http://")
    )
    unit = draw.choice((" ", ";", ",", "%41", "%2C", "%2b", "=", "\u00e9", "AAA ", "-_", "\n", "a/", "data:"))
    value = start + unit * (draw.choice((1000, count)) // len(unit)) + draw.choice(("", "x", "="))
    number = min(500, 3_000_000 // len(value))
    path, body = draw.choice(
        (
            ("/embed", {"items": [{draw.choice(("image", "video")): value}] * number}),
            ("/v1/embeddings", {"input": [value] * min(number, 5), "truncate": "none"}),  # some are texts
            ("/img/embed", {"input": [value] * number}),
            ("/rerank", {"query": "a", "documents": [value] * min(number, 5), "truncate": False}),
        )
    )
    post(port, path, json.dumps(body).encode())


def upload(draw: random.Random, port: int) -> None:
    """A form of many parts, many headers, or data that could be costly to search for its end."""
    boundary = b"x" * draw.randrange(1, 70)
    named = b'content-disposition: form-data; name="image"; filename="a"\r\n'
    count = draw.randrange(1, 5000)
    unit = draw.choice((b"\r", b"\r\n", b"\r\n-", b"\r\n--" + boundary[:-1], b"--" + boundary, b"a"))
    body = draw.choice(
        (
            (b"--%s\r\n%s\r\nA\r\n" % (boundary, named)) * count,
            b"--%s\r\n%s\r\n%s\r\n" % (boundary, named, unit * count * 20),
            b"--%s\r\n%s%s\r\nA\r\n" % (boundary, b"a: b\r\n" * count, named),
            b"--%s\r\ncontent-disposition: form-data%s\r\n\r\nA\r\n" % (boundary, b';a="b' * count),
        )
    ) + draw.choice((b"", b"--%s--\r\n" % boundary))
    post(port, "/img/embed", body, {"content-type": f"multipart/form-data; boundary={boundary.decode()}"})


def many(draw: random.Random, port: int) -> None:
    """Some items with instructions of their own, or so many wrong ones that each must be refused in little time."""
    count = draw.choice((100, 500, 2048, 10_000))
    instructions = [f"task {draw.random()} " * draw.randrange(1, 20) for _ in range(10)]
    path, body = draw.choice(
        (
            ("/embed", {"items": [{"text": "a", "instruction": one} for one in instructions]}),
            ("/embed", {"items": [{f"instructio{number}{place}": 1 for place in range(5)} for number in range(count)]}),
            ("/embed", {"items": [{"image": "AAAA"}] * count}),
            ("/txt/embed", {"input": ["a"] * (count - 1) + [""]}),
            ("/rerank", {"query": "word " * draw.randrange(1, 9), "documents": instructions}),
            ("/rerank", {"query": "word " * 9000, "documents": ["a"] * count}),
            ("/rerank", {"query": "a", "documents": ["a"] * 10_000}),
            ("/embed_texts", {"texts": [*["a"] * 10, 5]}),
        )
    )
    post(port, path, json.dumps(body).encode())


def address(draw: random.Random, port: int) -> None:
    """Paths, methods, ids and URLs that could become labels of metrics, lines of the log, or requests elsewhere."""
    path = "/" + "".join(draw.choices("abc/%41.;{}", k=draw.randrange(1, 300)))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        method = draw.choice(("GET", "POST", "PUT", "DELETE", "M" + "X" * draw.randrange(20)))
        connection.request(
            method, path, b"{}", {"x-request-id": "a" * draw.randrange(300), "content-type": "application/json"}
        )
        connection.getresponse().read()
    host = draw.choice(("127.0.0.1", "169.254.169.254", "[::1]", "localhost", "0x7f.1", "a@b", "2130706433"))
    post(port, "/img/embed", json.dumps({"input": f"http://{host}:{port}/metrics?{draw.random()}"}).encode())


KINDS: tuple[Callable[[random.Random, int], None], ...] = (
    compressed,
    compressed_in_chunks,
    refused,
    structure,
    text,
    string,
    upload,
    many,
    address,
)
