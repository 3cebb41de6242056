"""The forms in which clients write content become the native form; what cannot be kept is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from embedder.errors import InvalidRequest
from embedder.http.dialects.messages import (
    InputType,
    instruction_for,
    item_from_conversation,
    item_from_string,
    parts_from_content,
    text_limit,
)
from embedder.inputs.items import EXAMPLE_IMAGE, Text
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings

URI = "data:image/png;base64,AAAA"
CLIP = "data:video/mp4;base64,AAAA"
IMAGE = {"type": "image", "image": URI}


@pytest.mark.parametrize(
    ("part", "native"),
    [
        ({"type": "text", "text": "a"}, {"type": "text", "text": "a"}),
        ({"type": "input_text", "text": "a"}, {"type": "text", "text": "a"}),
        ({"type": "image_url", "image_url": {"url": URI}}, IMAGE),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "high"}}, IMAGE),
        ({"type": "image_url", "image_url": URI, "uuid": "7"}, IMAGE),
        ({"type": "input_image", "image_url": URI, "detail": "auto"}, IMAGE),
        ({"type": "image", "image": URI}, IMAGE),
        ({"type": "image_base64", "image_base64": URI}, IMAGE),
        ({"type": "video_url", "video_url": {"url": CLIP}}, {"type": "video", "video": CLIP}),
        ({"type": "input_video", "input_video": {"data": "AA", "format": "mp4"}}, {"type": "video", "video": "AA"}),
        ({"type": "video", "video": [URI, URI], "fps": 1}, {"type": "video", "video": [URI, URI], "fps": 1}),
    ],
)
def test_part_in_each_clients_form_becomes_a_native_part(part: dict[str, Any], native: dict[str, Any]) -> None:
    assert parts_from_content([part]) == [native]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "content: got 5"),
        (None, "content: got null"),
        (["a"], "got 'a'"),
        ([{"text": "a"}], "has one of the types text, input_text"),
        ([{"type": ["text"], "text": "a"}], "has one of the types"),
        ([{"type": "input_audio", "input_audio": {}}], "has one of the types"),
        ([{"type": "text"}], "a part of type text: got .*; allowed: exactly one field with its content, `text`"),
        ([{"type": "text", "text": "a", "input_text": "b"}], "allowed: exactly one field with its content, `text`"),
        ([{"type": "image_url", "image_url": URI, "max_pixels": 5}], "unknown field: max_pixels"),
        ([{"type": "image_url", "image_url": {"url": URI, "path": "a"}}], "unknown field: path"),
        ([{"type": "image_url", "image_url": URI, "fps": 1}], "unknown field: fps"),
    ],
)
def test_invalid_content_is_refused_with_the_reason(content: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parts_from_content(content)


def test_string_is_a_text_unless_it_is_the_data_uri_of_a_picture_or_clip() -> None:
    assert item_from_string("data:image/png;base64,AAAA") == {"image": "data:image/png;base64,AAAA"}
    assert item_from_string("data:video/mp4;base64,AAAA") == {"video": "data:video/mp4;base64,AAAA"}
    for text in ("red", "", "data: we counted", "data:text/plain,red", "https://example.com/a.png", "a data:image/png"):
        assert item_from_string(text) == {"text": text}


MP4 = "AAAAIGZ0eXBpc29tAAACAGlzb21pc28yYXZjMW1wNDE="  # the first bytes of a file
PNG = EXAMPLE_IMAGE


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("DATA:image/png;base64,AAAA", "image"),
        (" \n data:image/png;base64,AAAA", "image"),
        ("data:Image/PNG;BASE64,AAAA", "image"),
        ("data:image/png ; base64 ,AAAA", "image"),
        ("data:image/png;charset=utf-8;base64,AAAA", "image"),
        ("data:image/svg+xml,<svg/>", "image"),
        (f"data:;base64,{PNG}", "image"),
        (f"data:application/octet-stream;base64,{PNG}", "image"),
        (f"data:application/octet-stream;base64, {MP4}", "video"),
        (f"Data:;Base64,{MP4}", "video"),
        ("data:VIDEO/mp4;base64,AAAA", "video"),
        ("data:text/plain;base64,aGVsbG8=", "image"),  # refused where it is decoded: it is none
        ("data:audio/wav;base64,not base64", "image"),
        ('data:application/octet-stream;name="a,b;c.png";base64,AAAA', "image"),
        ('data:;name="a;base64,AAAA', "image"),
        ("data:image;base64,AAAA", "image"),
        ("data:BASE64,AAAA", "image"),
        ("data://image/png;base64,AAAA", "image"),
        ("\ufeffdata:;base64,AAAA", "image"),
        ("\u200b\u00a0DATA:;base64,AAAA", "image"),
    ],
)
def test_base64_data_uri_of_any_form_is_never_embedded_as_text(text: str, kind: str) -> None:
    assert item_from_string(text) == {kind: text}
    if "base64" in text.lower():
        with pytest.raises(InvalidRequest, match=r"text: got a data URI with base64, .* Send a picture as `image`"):
            Text(text)


@pytest.mark.parametrize(
    "text",
    [
        "data: we counted; base64, too",
        "data: base64, too",
        "data:text/plain,red",
        "database64,",
        "a data:;base64,AAAA",
        "base64,AAAA",
    ],
)
def test_text_about_data_is_a_text(text: str) -> None:
    assert Text(text).text == text


def test_conversation_is_its_user_message_and_the_system_message_its_instruction() -> None:
    user = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "a"}],
    }
    content = [IMAGE, {"type": "text", "text": "a"}]
    assert item_from_conversation([user]) == {"content": content}
    system = {"role": "system", "content": [{"type": "text", "text": "Find "}, {"type": "text", "text": "it."}]}
    empty = {"role": "assistant", "content": [{"type": "text", "text": ""}]}  # as in vLLM's example
    assert item_from_conversation([system, user, empty]) == {"instruction": "Find it.", "content": content}
    assert item_from_conversation([{"role": "developer", "content": "Find."}, user])["instruction"] == "Find."


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("a", "messages: got 'a'"),
        (["a"], "objects with role and content"),
        ([{"role": "user", "content": "a"}] * 2, "second or unusable message of role 'user'"),
        ([{"role": "system", "content": "a"}] * 2, "second or unusable message of role 'system'"),
        ([{"role": "assistant", "content": "Sure."}], "second or unusable message of role 'assistant'"),
        ([{"role": "tool", "content": "a"}], "role 'tool'"),
        ([{"content": "a"}], "role null"),
        ([{"role": "system", "content": [{"type": "image_url", "image_url": URI}]}], "allowed: text"),
        ([{"role": "system", "content": [{"type": "text", "text": 5}]}], "allowed: text"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "unknown field: tool_calls"),
    ],
)
def test_dialogue_that_the_model_was_not_trained_on_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        item_from_conversation(messages)


def test_queries_get_the_query_instruction_and_all_others_the_default() -> None:
    queries = {name for name in get_args(InputType) if instruction_for(name) == QUERY_INSTRUCTION}
    assert queries == {"search_query", "query", "retrieval.query", "code.query"}
    assert {instruction_for(name) for name in set(get_args(InputType)) - queries} == {None}
    assert instruction_for(None) is None


def test_token_limit_of_a_client_applies_where_it_is_below_the_services() -> None:
    settings = Settings(max_input_tokens=1000)
    assert [text_limit("max_tokens", tokens, settings) for tokens in (None, -1, 1000, 32768)] == [None] * 4
    assert [text_limit("max_tokens", tokens, settings) for tokens in (1, 999)] == [1, 999]
    for tokens in (0, -2):
        with pytest.raises(InvalidRequest, match=rf"max_tokens: got {tokens}; allowed: -1, or from 1 to 1000"):
            text_limit("max_tokens", tokens, settings)
