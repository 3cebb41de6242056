"""What a request must satisfy before a route sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
from starlette.types import Message, Receive, Scope, Send

from embedder.http.boundary import PROBES, RequestBoundary
from embedder.http.drain import Drain
from tests.http.asgi import Echo, call, chunks, guard, status_and_error


@pytest.mark.parametrize("parts", [(b"",), (b"x" * 10,), (b"x" * 4, b"x" * 6), (b"", b"x" * 10, b"")], ids=len)
def test_body_within_the_limit_arrives_whole_and_then_the_disconnect(parts: tuple[bytes, ...]) -> None:
    app = Echo()
    sent = call(app, chunks(*parts))
    assert sent[1]["body"] == b"".join(parts)
    assert app.after == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("parts", [(b"x" * 11,), (b"x" * 10, b"x"), (b"x" * 4, b"x" * 7, b"never read" * 99)], ids=len)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_body_of_one_byte_more_is_refused_before_the_app_sees_it(parts: tuple[bytes, ...], method: str) -> None:
    app = Echo()
    sent = call(app, chunks(*parts), method=method)
    is_rest_left = len(parts) == 3
    assert ((b"connection", b"close") in sent[0]["headers"]) == is_rest_left
    assert status_and_error(sent) == (
        413,
        {
            "code": "request_too_large",
            "message": "the request body is larger than 10 bytes, the limit (EMBEDDER_MAX_BODY_BYTES)",
            "item": None,
            "type": "invalid_request",
        },
    )
    assert app.calls == 0


async def statuses_of(requests: Sequence[tuple[str, bytes]], api_key: str | None = None) -> dict[int, int | bytes]:
    """Send requests, by key and body, that all get their responses at the end. Their statuses by index in the order of
    their responses, or what they say about a repetition.
    """
    may_answer = asyncio.Event()
    found: dict[int, int | bytes] = {}

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive_of(messages: Iterator[Message]) -> Message:
        return next(messages, {"type": "http.disconnect"})

    async def send_of(index: int, message: Message) -> None:
        if message["type"] == "http.response.start":
            found[index] = dict(message["headers"]).get(b"retry-after", message["status"])

    inner = guard(app, api_key=api_key)
    one = RequestBoundary(inner, drain=inner.drain, is_logged=False)
    tasks = []
    for index, (key, body) in enumerate(requests):
        scope = {"type": "http", "path": "/embed", "method": "POST", "headers": [(b"x-api-key", key.encode())]}
        messages = iter(chunks(body[:4], body[4:]))
        tasks.append(asyncio.create_task(one(scope, partial(receive_of, messages), partial(send_of, index))))
        await asyncio.sleep(0)
    may_answer.set()
    await asyncio.gather(*tasks)
    assert inner.held_bytes.used == 0
    return found


@pytest.mark.parametrize(("small_body", "second"), [(3, b"1"), (8, 200)])
def test_sum_of_all_bodies_is_limited_until_their_responses(
    small_body: int, second: int | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is 15 bytes: next to a body of 8, another of 8 is refused unless it counts as small."""
    monkeypatch.setattr("embedder.http.guard.SMALL_BODY_BYTES", small_body)
    body = b"x" * 8
    assert asyncio.run(statuses_of([("", body), ("", body), ("", b"x" * 7)])) == {0: 200, 1: second, 2: 200}


def test_bodies_of_one_caller_leave_room_for_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 15 bytes, a caller may use 13 if nobody else uses any, so 2 are left for others."""
    monkeypatch.setattr("embedder.http.guard.SMALL_BODY_BYTES", 0)
    requests = [("a", b"x" * 8), ("a", b"x" * 6), ("a", b"x" * 5), ("b", b"x"), ("b", b"x" * 2), ("c", b"x")]
    found = asyncio.run(statuses_of(requests, api_key="a,b,c"))
    assert found == {0: 200, 1: b"1", 2: 200, 3: 200, 4: b"1", 5: b"1"}


@pytest.mark.parametrize("body", [b"[1,2,3,4]", b"[[[[]]]]", b"[{},{}]"])
def test_body_of_too_many_values_is_refused_before_the_app_sees_it(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedder.http.json_limits.MAX_VALUES_PER_ITEM", 3)
    app = Echo()
    status, error = status_and_error(call(app, chunks(body)))
    assert (status, error["code"]) == (413, "request_too_large")
    assert (
        error["message"]
        == "the request body holds more than 3 JSON values, the limit, which grows with EMBEDDER_MAX_ITEMS_PER_REQUEST"
    )
    assert app.calls == 0
    assert call(app, chunks(b'",,,,,"'))[0]["status"] == 200


@pytest.mark.parametrize(
    ("headers", "body", "named"),
    [
        ([(b"content-type", b"application/json; charset=latin1")], b"{}", "got latin1"),
        ([(b"content-type", b'application/json; a=b; charset="UTF-16"')], b"{}", "got utf-16"),
        ([], "{}".encode("utf-16"), "the body is UTF-16 or UTF-32"),
        ([], b"{\0}\0", "the body is UTF-16 or UTF-32"),
        ([], b"\0\0\0{", "the body is UTF-16 or UTF-32"),
    ],
)
def test_other_charsets_are_refused_by_name(headers: list[tuple[bytes, bytes]], body: bytes, named: str) -> None:
    status, error = status_and_error(call(Echo(), chunks(body), headers=headers))
    assert (status, error["message"]) == (415, f"charset: {named}; allowed: utf-8")


@pytest.mark.parametrize("charset", [b"utf-8", b"UTF-8", b'"utf8"', b"us-ascii", b"", b'""'])
def test_utf_8_is_accepted_with_and_without_a_byte_order_mark(charset: bytes) -> None:
    headers = [(b"content-type", b"application/json;charset=" + charset)]
    for body in (b"{}", b"\xef\xbb\xbf{}"):
        assert call(Echo(), chunks(body), headers=headers)[1]["body"] == b"{}"


@pytest.mark.parametrize("sent_so_far", [[], chunks(b"x", b"x")[:1]], ids=["nothing", "half"])
def test_request_whose_client_disconnects_while_sending_does_not_reach_the_app(sent_so_far: list[Message]) -> None:
    app = Echo()
    assert call(app, sent_so_far) == []
    assert app.calls == 0


@pytest.mark.parametrize(
    "content_type",
    [b"application/json", b"application/json; charset=utf-8", b"Application/JSON", b"application/ld+json"],
)
def test_every_json_content_type_is_accepted(content_type: bytes) -> None:
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
def test_other_content_types_are_refused_before_the_app_sees_them(content_type: bytes) -> None:
    app = Echo()
    status, error = status_and_error(call(app, chunks(b"{}"), headers=[(b"Content-Type", content_type)]))
    assert (status, error["code"], error["type"]) == (415, "unsupported_content_type", "invalid_request")
    assert "; allowed: application/json" in error["message"]
    assert app.calls == 0


@pytest.mark.parametrize("order", [1, -1])
def test_second_content_type_that_is_not_json_is_refused(order: int) -> None:
    types = [(b"content-type", b"application/vnd.bentoml+pickle"), (b"content-type", b"application/json")]
    assert status_and_error(call(Echo(), chunks(b"{}"), headers=types[::order]))[0] == 415


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_methods_without_a_body_are_not_read(method: str) -> None:
    sent = call(Echo(), method=method, headers=[(b"content-type", b"text/plain")])
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_protocols_pass_unchanged(kind: str) -> None:
    seen: list[tuple[str, Message]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["type"], await receive()))
        await send({"type": "websocket.close"})

    assert call(app, [{"type": "first"}], kind=kind) == [{"type": "websocket.close"}]
    assert seen == [(kind, {"type": "first"})]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", "/embed_texts", "/metrics", "/page/x", "/embed/"])
def test_body_without_a_key_is_dropped_and_does_not_reach_the_app(method: str, path: str) -> None:
    app, body = Echo(), iter(chunks(b"{}"))
    sent = call(app, body, path=path, method=method, api_key="one", headers=[(b"authorization", b"Bearer on")])
    status, error = status_and_error(sent)
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert error["type"] == ("invalid_request_error" if path.startswith("/v1") else "invalid_request")
    assert (b"www-authenticate", b'Bearer error="invalid_token"') in sent[0]["headers"]
    assert app.calls == 0
    assert len(list(body)) == (0 if method == "POST" else 1)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/", ""])
def test_root_needs_a_key_too_and_says_so_in_the_form_of_tei(method: str, path: str) -> None:
    app = Echo()
    start, body = call(app, chunks(b"{}"), path=path, method=method, api_key="one")[:2]
    assert (start["status"], app.calls) == (401, 0)
    assert json.loads(body["body"])["error_type"] == "missing_api_key"


@pytest.mark.parametrize("path", [*sorted(PROBES), "/page"])
def test_probes_and_open_pages_need_no_key(path: str) -> None:
    assert call(Echo(), path=path, method="GET", api_key="one")[0]["status"] == 200


def test_request_with_a_key_reaches_the_app() -> None:
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
