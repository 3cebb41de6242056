"""Any input gives a result or an `InvalidRequest`, never another exception."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from embedder.http.dialects.cohere import parse_cohere
from embedder.http.dialects.embed import parse_embed
from embedder.http.dialects.local import parse_text_request
from embedder.http.dialects.openai import parse_embeddings
from embedder.http.request_body import read_json
from embedder.inputs.items import Text
from tests.inputs import fuzz, hostile

NAMES = sorted({*hostile.WRONG, "text", "image", "video", "content", "type", "role", "fps", "id", "url", "image_url"})
WORDS = st.sampled_from([*NAMES, "user", "system", "assistant", "query", "END", "float", "base64", "data:image/png,"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4) | JSON


@hypothesis.given(BODIES)
@hypothesis.settings(max_examples=100)
def test_any_json_gives_items_or_an_invalid_request(value: Any) -> None:
    fuzz.check_request(json.dumps(value).encode())


@pytest.mark.slow
@hypothesis.given(BODIES)
@hypothesis.settings(max_examples=2000)
def test_any_json_of_many_gives_items_or_an_invalid_request(value: Any) -> None:
    fuzz.check_request(json.dumps(value).encode())


@hypothesis.given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_texts_arrive_whole_and_in_order_on_every_route(texts: list[str]) -> None:
    hypothesis.assume(not any(text.startswith("data:") for text in texts))  # OpenAI's route takes these as images
    for parse, field in (
        (parse_text_request, "input"),
        (parse_embed, "items"),
        (parse_embeddings, "input"),
        (parse_cohere, "texts"),
    ):
        body = json.dumps({field: texts}, ensure_ascii=False).encode()
        assert [item.parts for item in parse(read_json(body), fuzz.SETTINGS).items] == [(Text(text),) for text in texts]


@st.composite
def damaged(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """A file with bytes changed, a piece removed, or a piece of another file inserted."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.lists(st.integers(0, len(data)), min_size=2, max_size=2)))
        match draw(st.sampled_from(["change", "cut", "splice"])):
            case "change":
                data[start : start + 1] = draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del data[start:end]
            case "splice":
                data[start:start] = draw(st.sampled_from(files))[start:end]
    return bytes(data)


@pytest.mark.parametrize("kind", fuzz.IMAGES)
@hypothesis.given(data=st.data())
def test_damaged_image_gives_an_image_or_invalid_media(kind: str, data: st.DataObject) -> None:
    fuzz.check_image(data.draw(damaged([fuzz.IMAGES[kind], *fuzz.IMAGES.values()])))


@hypothesis.given(damaged(fuzz.CHECKS["video"][1]))
def test_damaged_video_gives_a_video_or_invalid_media(data: bytes) -> None:
    fuzz.check_video(data)
