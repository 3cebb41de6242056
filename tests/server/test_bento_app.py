"""Error responses of BentoML and Starlette become this service's errors."""

from __future__ import annotations

import json

import pytest

from tests.http.asgi import answering, call, status_and_error

DETAIL = [{"loc": ["texts", 0], "msg": "Field required"}, {"loc": [], "msg": "no"}]
SHAPES = {  # status and body of BentoML's own errors (1.4.40), or of anything else -> our code and message
    "validation": (400, {"error": "2 errors", "detail": DETAIL}, "invalid_request", "texts: 0: Field required; no"),
    "one error": (400, {"error": "it is wrong"}, "invalid_request", "it is wrong"),
    "a list": (400, [{"error": "it is wrong"}], "invalid_request", "it is wrong"),
    "of the inside": (500, [{"error": "KeyError: 'weights'"}], "internal_error", "Internal Server Error"),
    "a traceback": (500, b"Traceback (most recent call last)", "internal_error", "Internal Server Error"),
    "an empty list": (500, [], "internal_error", "Internal Server Error"),
    "a number": (400, 5, "invalid_request", "Bad Request"),
    "no fields": (503, {}, "not_ready", "the service is not ready"),
    "detail in words": (400, {"detail": "it is wrong"}, "invalid_request", "it is wrong"),
    "error that is an object": (400, {"detail": None, "error": {"a": 1}}, "invalid_request", "{'a': 1}"),
    "not found": (404, b"Not Found", "not_found", "no such path: /embed; /openapi.json lists the paths"),
    "method": (405, b"Method Not Allowed", "method_not_allowed", "/embed does not take GET"),
    "nothing": (503, b"", "not_ready", "the service is not ready"),
    "blank": (500, b" \n", "internal_error", "Internal Server Error"),
    "not UTF-8": (400, b"caf\xe9", "invalid_request", "caf\ufffd"),
    "other status": (418, b"", "invalid_request", "I'm a Teapot"),
    "no known status": (498, b"", "invalid_request", "error 498"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_error_response_of_any_form_becomes_the_services_error(name: str) -> None:
    status, body, code, message = SHAPES[name]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    half = len(raw) // 2
    sent = call(answering(status, raw[:half], raw[half:], headers=[(b"Content-Length", b"1")]), method="GET")
    kind = "invalid_request" if status < 500 else "unavailable" if status == 503 else "server_error"
    expected = status if status in (400, 404, 405, 500, 503) else 400
    assert status_and_error(sent) == (expected, {"code": code, "message": message, "item": None, "type": kind})


def test_response_to_a_wrong_method_keeps_the_header_that_names_the_right_ones() -> None:
    sent = call(answering(405, b"Method Not Allowed", headers=[(b"allow", b"POST")]), method="GET")
    assert (b"allow", b"POST") in sent[0]["headers"]
    assert status_and_error(sent)[0] == 405
