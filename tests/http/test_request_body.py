"""Messages about a body that is wrong name the field, the value received, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from embedder.errors import InvalidRequest
from embedder.http.dialects.dashscope import PATH as DASHSCOPE
from embedder.http.dialects.dialect import by_path, choose_dialect
from embedder.http.routes import DIALECTS, path_hint
from embedder.settings import Settings

CONTENTS = {"contents": [{"text": "red"}]}
INFER = "/v2/models/{model}/infer"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (DASHSCOPE, {"input": ["red"]}, "input: got ['red'] (a list); allowed: an object with contents"),
        (DASHSCOPE, {"input": "red"}, "input: got 'red' (a string); allowed: an object with contents"),
        (DASHSCOPE, {"input": {}}, "input.contents: missing"),
        (DASHSCOPE, {"input": {"contents": []}}, "input.contents: got an empty list; allowed: at least one item"),
        (DASHSCOPE, {"input": {"contents": "red"}}, "input.contents: got 'red' (a string); input should be a valid list"),
        (DASHSCOPE, {"input": {"content": ["red"]}}, "unknown field: content (did you mean contents?)"),
        (DASHSCOPE, {"input": CONTENTS, "parameters": {"dimensio": 64}}, "unknown field: dimensio (did you mean dimension?)"),
        (DASHSCOPE, {"input": CONTENTS, "parameters": {"instruct": 5}}, "parameters.instruct: got 5 (a number); input should be a valid string"),
        ("/similarity", {"inputs": ["a"]}, "inputs: got ['a'] (a list); allowed: an object with sentences, source_sentence"),
        (INFER, {"inputs": ["a"]}, "inputs[0]: got 'a' (a string); allowed: an object with data, datatype, name, parameters, shape"),
        ("/predict", {"instances": []}, "instances: got an empty list; allowed: at least one item"),
        ("/predict", {"instances": [5]}, "got 5 (a number); allowed: a text, or an object with text, image or content"),
        ("/predict", {"instances": ["red"], "parameters": {"dimension": 64.5}}, "dimensions: got 64.5 (a number); allowed: a positive whole number, at most the model's hidden_size"),
        ("/predict", {"instances": ["red"], "parameters": {"dims": 64}}, "unknown field: dims (did you mean dim?)"),
        ("/predict", {"inputs": ["red"]}, "unknown field: inputs (did you mean instances?)"),
        ("/txt/embed", {"text": "red"}, "unknown field: text (did you mean input?)"),
        ("/img/embed", {"image": "abc"}, "unknown field: image (did you mean input?)"),
        ("/embed", {"text": "red"}, "unknown field: text (did you mean items?)"),
        ("/api/embed", {"text": "red"}, "unknown field: text"),
        ("/txt/embed", {"text": "red", "size": 3}, "unknown fields: text, size; missing: input"),
        ("/txt/embed", {"input": "red", "dimesions": 64}, "unknown field: dimesions (did you mean dimensions?)"),
        ("/txt/embed", {"input": 5}, "input: got 5 (a number); allowed: a string or a list of strings"),
    ],
)  # fmt: skip
def test_message_names_the_field_and_what_is_allowed(path: str, body: dict[str, Any], message: str) -> None:
    dialect = choose_dialect(by_path(DIALECTS)[path], body)
    with pytest.raises(InvalidRequest) as failure:
        dialect.parse(body, Settings())
    assert failure.value.message == message


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("/v1/v1/embeddings", "/v1/embeddings"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/text/embed", "/txt/embed"),
        ("/api/embedding", "/api/embeddings"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/chat/completions", ""),
        ("/favicon.ico", ""),
    ],
)
def test_unknown_path_that_is_like_a_route_names_it(path: str, nearest: str) -> None:
    assert path_hint(path) == nearest
