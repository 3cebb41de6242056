"""The edge around an app of a few lines, without BentoML or a socket."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.http.api_keys import ApiKeys
from embedder.http.guard import PROBES, RequestGuard
from embedder.server.lifecycle import Drain
from embedder.settings import Settings

LIMIT, MAX_HELD, MAX_VALUES, MAX_READ_S = 10, 15, 3, 0.05
MADE_ID = re.compile(rb"[0-9a-f]{32}")


def edge(app: ASGIApp, *, api_key: str | None = None, drain: Drain | None = None) -> RequestGuard:
    keys, drain = ApiKeys(Settings(api_key=api_key)), drain or Drain()
    opened = frozenset({"/page"})
    return RequestGuard(
        app, LIMIT, MAX_HELD, MAX_VALUES, MAX_READ_S, keys=keys, drain=drain, open_paths=opened, is_logged=False
    )


def call(
    app: ASGIApp,
    received: Iterable[Message] = (),
    *,
    path: str = "/embed",
    method: str = "POST",
    headers: Iterable[tuple[bytes, bytes]] = (),
    kind: str = "http",
    **options: Any,
) -> list[Message]:
    """The messages that a client gets; after those it sends it is gone."""
    sent: list[Message] = []
    messages = iter(received)

    async def receive() -> Message:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": list(headers)}
    asyncio.run(edge(app, **options)(scope, receive, send))
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
    start, body, *end = sent
    assert end == [{"type": "http.response.body"}] * body.get("more_body", False)  # once the body's rest was dropped
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


@pytest.mark.parametrize(
    ("small_body", "expected"),
    [(3, [(429, b"1"), (200, None), (200, None)]), (8, [(200, None), (200, None), (200, None)])],
)
def test_bodies_that_wait_are_bounded_together_until_their_answers(
    small_body: int, expected: list[tuple[int, bytes | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 bytes may be held: while one of 8 waits, another of 8 is refused unless it is small, and let in afterwards."""
    monkeypatch.setattr("embedder.http.guard.SMALL_BODY", small_body)
    statuses = []

    async def receive_of(messages: Iterator[Message]) -> Message:
        return next(messages, {"type": "http.disconnect"})

    async def run() -> None:
        may_answer = asyncio.Event()

        async def app(_: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await may_answer.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append((message["status"], dict(message["headers"]).get(b"retry-after")))

        one = edge(app)
        scope = {"type": "http", "path": "/embed", "method": "POST", "headers": []}

        def ask() -> Coroutine[Any, Any, None]:
            return one(scope, partial(receive_of, iter(chunks(b"x" * 4, b"x" * 4))), send)

        first = asyncio.create_task(ask())
        await asyncio.sleep(0)
        second = asyncio.create_task(ask())
        await asyncio.sleep(0.01)
        may_answer.set()
        await asyncio.gather(first, second)
        await ask()
        assert one.held_bytes == 0

    asyncio.run(run())
    assert statuses == expected


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


@pytest.mark.parametrize("order", [1, -1])
def test_one_content_type_of_several_that_is_another_is_refused(order: int) -> None:
    types = [(b"content-type", b"application/vnd.bentoml+pickle"), (b"content-type", b"application/json")]
    assert status_and_error(call(Echo(), chunks(b"{}"), headers=types[::order]))[0] == 415


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
    assert (sent[0]["status"], sent[0]["headers"][:-1]) == (200, headers)
    assert [(one["body"], one["more_body"]) for one in sent[1:]] == [(b"a", True), (b"", True), (b"b", False)]


def test_redirect_passes_untouched() -> None:
    sent = call(answering(307, b"", headers=[(b"location", b"/docs")]), method="GET")
    assert (sent[0]["status"], sent[0]["headers"][:-1]) == (307, [(b"location", b"/docs")])


DETAIL = [{"loc": ["texts", 0], "msg": "Field required"}, {"loc": [], "msg": "no"}]
SHAPES = {  # status and body of BentoML's own errors (1.4.39), or of anything else -> code and message of ours
    "validation": (400, {"error": "2 errors", "detail": DETAIL}, "invalid_request", "texts: 0: Field required; no"),
    "one error": (400, {"error": "it is wrong"}, "invalid_request", "it is wrong"),
    "a list": (400, [{"error": "it is wrong"}], "invalid_request", "it is wrong"),
    "of the inside": (500, [{"error": "KeyError: 'weights'"}], "internal_error", "Internal Server Error"),
    "a traceback": (500, b"Traceback (most recent call last)", "internal_error", "Internal Server Error"),
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
    "no known status": (498, b"", "invalid_request", "error 498"),
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
            {"message": "Internal Server Error", "type": "server_error", "param": None, "code": "internal_error"},
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
        asyncio.run(edge(app)(scope, receive, send))
    assert [one["status"] for one in sent] == ([200] if status == 200 else [])


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/embed", "/v1/embeddings", "/embed_texts", "/metrics", "/", "/page/x", "/livez/", ""]
)
def test_without_a_key_the_body_is_dropped_and_nothing_answered(method: str, path: str) -> None:
    app, body = Echo(), iter(chunks(b"{}"))
    sent = call(app, body, path=path, method=method, api_key="one", headers=[(b"authorization", b"Bearer on")])
    status, error = status_and_error(sent)
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert error["type"] == ("invalid_request_error" if path.startswith("/v1") else "invalid_request")
    assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
    assert app.calls == 0
    assert len(list(body)) == (0 if method == "POST" else 1)


@pytest.mark.parametrize("path", [*sorted(PROBES), "/page"])
def test_probes_and_open_pages_need_no_key(path: str) -> None:
    assert call(Echo(), path=path, method="GET", api_key="one")[0]["status"] == 200


def test_with_a_key_the_app_is_reached() -> None:
    headers = [(b"authorization", b"Bearer two")]
    assert call(Echo(), chunks(b"{}"), api_key="one,two", headers=headers)[1]["body"] == b"{}"


def test_draining_worker_refuses_new_requests_and_answers_probes() -> None:
    drain, app = Drain(), Echo()
    drain.is_draining = True
    sent = call(app, chunks(b"{}"), path="/v1/embeddings", drain=drain)
    status, error = status_and_error(sent)
    assert (status, error["code"], app.calls) == (503, "shutting_down", 0)
    assert (b"connection", b"close") in sent[0]["headers"]
    for path in PROBES:
        sent = call(app, path=path, method="GET", drain=drain)
        assert sent[0]["status"] == 200
        assert (b"connection", b"close") in sent[0]["headers"]


def id_of(sent: list[Message]) -> bytes:
    (value,) = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    return bytes(value)


@pytest.mark.parametrize("given", [b"a", b"7b1e-4f.x_Y:0", b"x" * 64])
@pytest.mark.parametrize("path", ["/embed", "/v1/models"])
def test_sane_request_id_comes_back_on_every_answer(given: bytes, path: str) -> None:
    for app in (Echo(), answering(404, b"Not Found"), answering(429, OURS)):
        assert id_of(call(app, path=path, method="GET", headers=[(b"X-Request-Id", given)])) == given
    assert id_of(call(Echo(), chunks(b"x" * 11), headers=[(b"x-request-id", given)])) == given


@pytest.mark.parametrize("given", [b"", b"x" * 65, b"a b", b"a\nb", b"a\r\nset-cookie: x", b"\xc3\xa9", b'"', b"<b>"])
def test_any_other_request_id_is_replaced(given: bytes) -> None:
    sent = call(Echo(), method="GET", headers=[(b"x-request-id", given)])
    assert MADE_ID.fullmatch(id_of(sent))


def test_requests_without_an_id_get_one_each() -> None:
    ids = {id_of(call(Echo(), method="GET")) for _ in range(3)}
    assert len(ids) == 3
    assert all(MADE_ID.fullmatch(one) for one in ids)


@pytest.mark.parametrize("status", [200, 400])
def test_headers_tell_nothing_of_what_serves(status: int) -> None:
    given = [(b"Server", b"BentoML"), (b"X-BentoML-Request-ID", b"5"), (b"server-timing", b"db"), (b"vary", b"x")]
    sent = call(answering(status, b"{}", headers=given), method="GET")
    names = {name.lower() for name, _ in sent[0]["headers"]} - {b"content-type", b"content-length"}
    assert names == {b"server-timing", b"vary", b"x-request-id"}


def test_page_without_a_policy_gets_one_and_another_keeps_its_own() -> None:
    html = (b"content-type", b"text/html; charset=utf-8")
    foreign = dict(call(answering(200, b"<p>", headers=[html]), method="GET")[0]["headers"])
    assert foreign[b"content-security-policy"].startswith(b"default-src 'self'; ")
    assert b"script-src" not in foreign[b"content-security-policy"]  # so scripts, too, come from here alone
    assert (foreign[b"x-content-type-options"], foreign[b"x-frame-options"]) == (b"nosniff", b"DENY")
    own = [html, (b"Content-Security-Policy", b"default-src 'none'")]
    assert call(answering(200, b"<p>", headers=own), method="GET")[0]["headers"][:-1] == own


def test_trailers_change_no_header_that_was_checked() -> None:
    """uvicorn appends them to the list that it gave."""
    app = Echo()
    seen: list[object] = []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "path": "/embed", "method": "POST", "headers": headers}

    async def receive() -> Message:
        headers.append((b"content-type", b"multipart/form-data"))
        return chunks(b"{}")[0]

    async def send(message: Message) -> None:
        pass

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["headers"])
        await app(scope, receive, send)

    asyncio.run(edge(look)(scope, receive, send))
    assert seen == [[(b"content-type", b"application/json")]]


def test_rest_of_a_refused_body_is_dropped_before_the_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.http.guard.DROPPED_S", 0.05)
    messages = iter(chunks(b"x" * 11, b"x", b"x"))
    sent = call(Echo(), messages)
    assert [message.get("more_body") for message in sent] == [None, True, None]
    assert not list(messages)


def test_refused_body_is_waited_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.http.guard.DROPPED_S", 0.05)
    statuses = []

    async def receive() -> Message:
        if statuses:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"x" * 11, "more_body": True}

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    async def run() -> None:
        async with asyncio.timeout(5):
            await edge(Echo())({"type": "http", "path": "/embed", "method": "POST", "headers": []}, receive, send)

    asyncio.run(run())
    assert statuses == [413, None, None]
