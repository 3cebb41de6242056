"""What every response has in common, and how an error becomes one."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedder.errors import EngineFailed, NotReady, Overloaded
from tests.http.asgi import Echo, answering, call, chunks, raising, status_and_error, whole

NO_PATH = "no such path: /v1/embeddings; /openapi.json lists the paths"
MADE_ID = re.compile(rb"[0-9a-f]{32}")


def test_streamed_200_passes_unchanged_piece_by_piece() -> None:
    headers = [(b"content-type", b"text/event-stream"), (b"x", b"1"), (b"x", b"2")]
    sent = call(answering(200, b"a", b"", b"b", headers=headers), chunks(b"{}"))
    assert (sent[0]["status"], sent[0]["headers"][:-1]) == (200, headers)
    assert [(one["body"], one["more_body"]) for one in sent[1:]] == [(b"a", True), (b"", True), (b"b", False)]


def test_redirect_passes_unchanged() -> None:
    sent = call(answering(307, b"", headers=[(b"location", b"/docs")]), method="GET")
    assert (sent[0]["status"], sent[0]["headers"][:-1]) == (307, [(b"location", b"/docs")])


def overloaded() -> Overloaded:
    return Overloaded("the queue is full", retry_after_s=6.5, item=3)


def test_raised_error_has_its_status_body_and_headers() -> None:
    sent = call(raising(overloaded()), chunks(b"{}"))
    assert status_and_error(sent) == (
        429,
        {"code": "overloaded", "message": "item 3: the queue is full", "item": 3, "type": "unavailable"},
    )
    assert (b"retry-after", b"7") in sent[0]["headers"]
    assert (b"connection", b"close") not in sent[0]["headers"]


def test_details_of_an_error_follow_it_in_the_body() -> None:
    error = EngineFailed("it broke")
    error.details = {"results": [1, 2]}
    body = call(raising(error), chunks(b"{}"))[1]["body"]
    assert body.startswith(b'{"error":{"code":"engine_failed",')
    assert body.endswith(b'},"results":[1,2]}')


@pytest.mark.parametrize(
    ("app", "status", "error"),
    [
        (
            raising(overloaded()),
            429,
            {
                "message": "item 3: the queue is full",
                "type": "rate_limit_error",
                "param": "input[3]",
                "code": "overloaded",
            },
        ),
        (
            answering(404, b"Not Found"),
            404,
            {"message": NO_PATH, "type": "invalid_request_error", "param": None, "code": "not_found"},
        ),
        (
            answering(500, b'[{"error": "it broke"}]'),
            500,
            {"message": "Internal Server Error", "type": "server_error", "param": None, "code": "internal_error"},
        ),
        (
            raising(NotReady("the service is not ready")),
            503,
            {"message": "the service is not ready", "type": "server_error", "param": None, "code": "not_ready"},
        ),
    ],
    ids=["ours", "not found", "BentoML's", "not ready"],
)
def test_every_error_under_v1_has_openais_form(app: ASGIApp, status: int, error: dict[str, Any]) -> None:
    assert status_and_error(call(app, path="/v1/embeddings", method="GET")) == (status, error)


def test_errors_of_the_guard_under_v1_have_openais_form() -> None:
    status, error = status_and_error(call(Echo(), chunks(b"x" * 11), path="/v1/embeddings"))
    assert (status, error["code"], error["type"]) == (413, "request_too_large", "invalid_request_error")
    assert error["param"] is None


@pytest.mark.parametrize("status", [None, 500])
def test_bug_is_logged_and_returns_500_with_the_request_id(
    status: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    sent = call(buggy(status), chunks(b"{}"), headers=[(b"x-request-id", b"abc")])
    code, error = status_and_error(sent)
    assert (code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert error["message"] == "internal error; the service's log has the reason at request abc"
    assert "it broke" not in json.dumps(error)
    assert "it broke" in caplog.text


def test_limit_of_the_system_is_one_line_and_503(caplog: pytest.LogCaptureFixture) -> None:
    """As every thread of the service that starts during a request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        previous = threading.stack_size(2**47)  # more than any system has
        try:
            await asyncio.to_thread(print)
        finally:
            threading.stack_size(previous)

    sent = call(app, chunks(b"{}"), path="/v1/embeddings")
    status, error = status_and_error(sent)
    assert (status, error["code"], error["type"]) == (503, "system_limit", "server_error")
    assert error["message"] == "the service has reached a limit of its system: can't start new thread"
    assert (b"retry-after", b"5") in sent[0]["headers"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "POST /v1/embeddings got 503, because a limit of the system is reached: can't start new thread"
    )
    assert record.exc_info is None


def test_bug_after_the_response_has_begun_is_raised_to_the_server() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "path": "/", "method": "POST", "headers": []}
    with pytest.raises(RuntimeError, match="it broke"):
        asyncio.run(whole(buggy(200))(scope, receive, send))
    assert [one["status"] for one in sent] == [200]


def buggy(status: int | None) -> ASGIApp:
    """Raises, after it has begun a response with this status, if any."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
        raise RuntimeError("it broke")

    return app


def id_of(sent: list[Message]) -> bytes:
    (value,) = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    return bytes(value)


@pytest.mark.parametrize("given", [b"a", b"7b1e-4f.x_Y:0", b"x" * 64])
@pytest.mark.parametrize("path", ["/embed", "/v1/models"])
def test_valid_request_id_is_in_every_response(given: bytes, path: str) -> None:
    for app in (Echo(), answering(404, b"Not Found"), raising(overloaded())):
        assert id_of(call(app, path=path, method="GET", headers=[(b"X-Request-Id", given)])) == given
    assert id_of(call(Echo(), chunks(b"x" * 11), headers=[(b"x-request-id", given)])) == given


@pytest.mark.parametrize("given", [b"", b"x" * 65, b"a b", b"a\nb", b"a\r\nset-cookie: x", b"\xc3\xa9", b'"', b"<b>"])
def test_invalid_request_id_is_replaced(given: bytes) -> None:
    sent = call(Echo(), method="GET", headers=[(b"x-request-id", given)])
    assert MADE_ID.fullmatch(id_of(sent))


def test_requests_without_an_id_get_different_ids() -> None:
    ids = {id_of(call(Echo(), method="GET")) for _ in range(3)}
    assert len(ids) == 3
    assert all(MADE_ID.fullmatch(one) for one in ids)


def test_headers_do_not_name_the_server() -> None:
    given = [(b"Server", b"BentoML"), (b"X-BentoML-Request-ID", b"5"), (b"server-timing", b"db"), (b"vary", b"x")]
    sent = call(answering(200, b"{}", headers=given), method="GET")
    names = {name.lower() for name, _ in sent[0]["headers"]} - {b"content-type", b"content-length"}
    assert names == {b"server-timing", b"vary", b"x-request-id"}


def test_page_without_a_security_policy_gets_one() -> None:
    html = (b"content-type", b"text/html; charset=utf-8")
    foreign = dict(call(answering(200, b"<p>", headers=[html]), method="GET")[0]["headers"])
    assert foreign[b"content-security-policy"].startswith(b"default-src 'self'; ")
    assert b"script-src" not in foreign[b"content-security-policy"]  # so default-src applies to scripts
    assert (foreign[b"x-content-type-options"], foreign[b"x-frame-options"]) == (b"nosniff", b"DENY")
    own = [html, (b"Content-Security-Policy", b"default-src 'none'")]
    assert call(answering(200, b"<p>", headers=own), method="GET")[0]["headers"][:-1] == own


@pytest.mark.parametrize("path", ["/embed/", "/embed//", "/v1/embeddings/"])
def test_trailing_slashes_do_not_count(path: str) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await answering(200, b"")(scope, receive, send)

    assert call(app, chunks(b"{}"), path=path)[0]["status"] == 200
    assert seen == [path.rstrip("/")]


@pytest.mark.parametrize("path", ["/", "/playground/"])
def test_pages_with_relative_links_keep_their_paths(path: str) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await answering(200, b"")(scope, receive, send)

    call(app, path=path, method="GET")
    assert seen == [path]


def test_rest_of_a_refused_body_is_dropped_before_the_response_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.http.boundary.MAX_DROPPED_S", 0.05)
    messages = iter(chunks(b"x" * 11, b"x", b"x"))
    sent = call(Echo(), messages)
    assert [message.get("more_body") for message in sent] == [None, True, None]
    assert not list(messages)


def test_rest_of_a_refused_body_is_read_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.http.boundary.MAX_DROPPED_S", 0.05)
    statuses = []

    async def receive() -> Message:
        if statuses:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"x" * 11, "more_body": True}

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    async def run() -> None:
        async with asyncio.timeout(5):
            await whole(Echo())({"type": "http", "path": "/embed", "method": "POST", "headers": []}, receive, send)

    asyncio.run(run())
    assert statuses == [413, None, None]
