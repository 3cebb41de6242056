"""The edge around an app of a few lines, without BentoML or a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.edge import Edge

LIMIT, MAX_VALUES = 10, 3


def call(
    app: ASGIApp,
    received: Iterable[Message] = (),
    *,
    path: str = "/embed",
    method: str = "POST",
    headers: Iterable[tuple[bytes, bytes]] = (),
    kind: str = "http",
) -> list[Message]:
    """The messages that a client gets; after those it sends it is gone."""
    sent: list[Message] = []
    messages = iter(received)

    async def receive() -> Message:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": list(headers)}
    asyncio.run(Edge(app, LIMIT, MAX_VALUES)(scope, receive, send))
    return sent


def chunks(*parts: bytes) -> list[Message]:
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": index < last} for index, part in enumerate(parts)]


class Echo:
    """Answers 200 with what it received; `calls` counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.after: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.after.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body})


def answering(status: int, *parts: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        for message in chunks(*parts):
            await send({**message, "type": "http.response.body"})

    return app


def status_and_error(sent: list[Message]) -> tuple[int, dict[str, Any]]:
    """Of an answer that must be whole, with the headers of JSON."""
    start, body = sent
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    assert len(headers) == len(start["headers"])
    fields = json.loads(body["body"])
    assert list(fields) == ["error"]
    return start["status"], fields["error"]


@pytest.mark.parametrize("parts", [(b"",), (b"x" * LIMIT,), (b"x" * 4, b"x" * 6), (b"", b"x" * LIMIT, b"")], ids=len)
def test_body_within_the_limit_arrives_whole_and_the_disconnect_behind_it(parts: tuple[bytes, ...]) -> None:
    app = Echo()
    sent = call(app, chunks(*parts))
    assert sent[1]["body"] == b"".join(parts)
    assert app.after == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("parts", [(b"x" * 11,), (b"x" * 10, b"x"), (b"x" * 4, b"x" * 7, b"never read" * 99)], ids=len)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_body_of_one_byte_more_is_refused_before_the_app_sees_it(parts: tuple[bytes, ...], method: str) -> None:
    app = Echo()
    sent = call(app, chunks(*parts), method=method)
    assert (b"connection", b"close") in sent[0]["headers"]
    assert status_and_error(sent) == (
        413,
        {
            "code": "request_too_large",
            "message": "the body is larger than 10 bytes; allowed: up to that",
            "item": None,
            "type": "invalid_request",
        },
    )
    assert app.calls == 0


@pytest.mark.parametrize("body", [b"[1,2,3,4]", b"[[[[]]]]", b"[{},{}]"])
def test_body_of_too_many_values_is_refused_before_the_app_sees_it(body: bytes) -> None:
    app = Echo()
    status, error = status_and_error(call(app, chunks(body)))
    assert (status, error["code"]) == (413, "request_too_large")
    assert error["message"] == "the body holds more than 3 JSON values; allowed: up to that"
    assert app.calls == 0
    assert call(app, chunks(b'",,,,,"'))[0]["status"] == 200


def test_compressed_body_is_refused_before_the_app_sees_it() -> None:
    app = Echo()
    status, error = status_and_error(call(app, chunks(b"{}"), headers=[(b"content-encoding", b"gzip")]))
    assert (status, error["message"]) == (415, "content encoding: got gzip; allowed: none")
    assert app.calls == 0


def test_what_is_over_the_limit_is_not_read() -> None:
    messages = iter(chunks(b"x" * 11, b"x", b"x"))
    call(Echo(), messages)
    assert len(list(messages)) == 2


@pytest.mark.parametrize("sent_so_far", [[], chunks(b"x", b"x")[:1]], ids=["nothing", "half"])
def test_client_that_goes_away_while_sending_gets_nothing_and_the_app_sees_nothing(sent_so_far: list[Message]) -> None:
    app = Echo()
    assert call(app, sent_so_far) == []
    assert app.calls == 0


@pytest.mark.parametrize(
    "content_type",
    [b"application/json", b"application/json; charset=utf-8", b"Application/JSON", b"application/ld+json"],
)
def test_json_by_any_of_its_names_is_let_through(content_type: bytes) -> None:
    sent = call(Echo(), chunks(b"{}"), headers=[(b"content-type", content_type)])
    assert sent[0]["status"] == 200


@pytest.mark.parametrize(
    "content_type",
    [
        b"text/plain",
        b"application/x-www-form-urlencoded",
        b"multipart/form-data",
        b"multipart/form-data; boundary=x",
        b"application/vnd.bentoml+pickle",
        b"",
        b"\xff\xfe",
    ],
)
def test_any_other_content_type_is_refused_before_the_app_sees_it(content_type: bytes) -> None:
    app = Echo()
    status, error = status_and_error(call(app, chunks(b"{}"), headers=[(b"Content-Type", content_type)]))
    assert (status, error["code"], error["type"]) == (415, "unsupported_content_type", "invalid_request")
    assert error["message"].endswith("; allowed: application/json")
    assert app.calls == 0


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_methods_without_a_body_are_not_waited_for(method: str) -> None:
    sent = call(Echo(), method=method, headers=[(b"content-type", b"text/plain")])
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_protocols_pass_untouched(kind: str) -> None:
    seen: list[tuple[str, Message]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["type"], await receive()))
        await send({"type": "websocket.close"})

    assert call(app, [{"type": "first"}], kind=kind) == [{"type": "websocket.close"}]
    assert seen == [(kind, {"type": "first"})]


def test_streaming_200_passes_piece_by_piece_untouched() -> None:
    headers = [(b"content-type", b"text/event-stream"), (b"x", b"1"), (b"x", b"2")]
    sent = call(answering(200, b"a", b"", b"b", headers=headers), chunks(b"{}"))
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": headers}
    assert [(one["body"], one["more_body"]) for one in sent[1:]] == [(b"a", True), (b"", True), (b"b", False)]


def test_redirect_passes_untouched() -> None:
    sent = call(answering(307, b"", headers=[(b"location", b"/docs")]), method="GET")
    assert sent[0] == {"type": "http.response.start", "status": 307, "headers": [(b"location", b"/docs")]}


DETAIL = [{"loc": ["texts", 0], "msg": "Field required"}, {"loc": [], "msg": "no"}]
SHAPES = {  # status and body of BentoML's own errors (1.4.39), or of anything else -> code and message of ours
    "validation": (400, {"error": "2 errors", "detail": DETAIL}, "invalid_request", "texts: 0: Field required; no"),
    "one error": (400, {"error": "it is wrong"}, "invalid_request", "it is wrong"),
    "a list": (500, [{"error": "it broke"}], "internal_error", "it broke"),
    "an empty list": (500, [], "internal_error", "Internal Server Error"),
    "a number": (400, 5, "invalid_request", "Bad Request"),
    "no fields": (503, {}, "not_ready", "Service Unavailable"),
    "detail in words": (400, {"detail": "it is wrong"}, "invalid_request", "it is wrong"),
    "error that is an object": (400, {"detail": None, "error": {"a": 1}}, "invalid_request", "{'a': 1}"),
    "not found": (404, b"Not Found", "not_found", "Not Found"),
    "method": (405, b"Method Not Allowed", "method_not_allowed", "Method Not Allowed"),
    "nothing": (503, b"", "not_ready", "Service Unavailable"),
    "blank": (500, b" \n", "internal_error", "Internal Server Error"),
    "not UTF-8": (400, b"caf\xe9", "invalid_request", "caf\ufffd"),
    "other status": (418, b"", "invalid_request", "I'm a Teapot"),
    "no known status": (499, b"", "invalid_request", "error 499"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_error_of_any_shape_gets_ours(name: str) -> None:
    status, body, code, message = SHAPES[name]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    half = len(raw) // 2
    sent = call(answering(status, raw[:half], raw[half:], headers=[(b"Content-Length", b"1")]), method="GET")
    kind = "invalid_request" if status < 500 else "server_error"
    assert status_and_error(sent) == (status, {"code": code, "message": message, "item": None, "type": kind})


OURS = b'{"error":{"code":"overloaded","message":"the queue is full","item":3,"type":"rate_limit"}}'


def test_error_that_is_ours_keeps_its_body_and_headers() -> None:
    headers = [(b"retry-after", b"7"), (b"content-type", b"application/json")]
    sent = call(answering(429, OURS, headers=headers), chunks(b"{}"))
    assert sent[1]["body"] == OURS
    assert (b"retry-after", b"7") in sent[0]["headers"]
    assert status_and_error(sent)[0] == 429


def test_error_with_results_behind_it_keeps_them() -> None:
    body = OURS[:-1] + b',"results":[]}'
    assert call(answering(400, body), chunks(b"{}"))[1]["body"] == body


@pytest.mark.parametrize(
    ("app", "status", "error"),
    [
        (
            answering(429, OURS),
            429,
            {"message": "the queue is full", "type": "rate_limit_error", "param": "input[3]", "code": "overloaded"},
        ),
        (
            answering(404, b"Not Found"),
            404,
            {"message": "Not Found", "type": "invalid_request_error", "param": None, "code": "not_found"},
        ),
        (
            answering(500, b'[{"error": "it broke"}]'),
            500,
            {"message": "it broke", "type": "server_error", "param": None, "code": "internal_error"},
        ),
        (
            answering(503, b""),
            503,
            {"message": "Service Unavailable", "type": "server_error", "param": None, "code": "not_ready"},
        ),
    ],
    ids=["ours", "not found", "BentoML's", "not ready"],
)
def test_under_v1_every_error_has_openais_shape(app: ASGIApp, status: int, error: dict[str, Any]) -> None:
    assert status_and_error(call(app, path="/v1/embeddings", method="GET")) == (status, error)


def test_under_v1_the_edges_own_errors_have_openais_shape_too() -> None:
    status, error = status_and_error(call(Echo(), chunks(b"x" * 11), path="/v1/embeddings"))
    assert (status, error["code"], error["type"]) == (413, "request_too_large", "invalid_request_error")
    assert error["param"] is None


@pytest.mark.parametrize("status", [None, 200, 500])
def test_app_that_raises_is_the_servers_to_answer(status: int | None) -> None:
    """What raises reaches the server as it was, and of an error that was begun nothing has been sent."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
        raise RuntimeError("it broke")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "path": "/", "method": "POST", "headers": []}
    with pytest.raises(RuntimeError, match="it broke"):
        asyncio.run(Edge(app, LIMIT, MAX_VALUES)(scope, receive, send))
    assert [one["status"] for one in sent] == ([200] if status == 200 else [])
