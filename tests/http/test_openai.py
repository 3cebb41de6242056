"""Bodies of OpenAI's route become items; vectors, the model and errors are written as OpenAI's clients read them."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from embedder.engine.postprocess import Embedding
from embedder.errors import EngineFailed, InvalidRequest, Overloaded, RequestTooLarge
from embedder.http.dialects.dialect import ServedModel
from embedder.http.dialects.openai import parse_embeddings
from embedder.http.dialects.openai_models import ModelsResponse, models_response
from embedder.http.dialects.openai_response import EmbeddingsResponse, embeddings_response
from embedder.http.dialects.vllm import EncodedRequest, Encoding
from embedder.http.error_forms import OpenAIErrorResponse, openai_error_body
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings

SETTINGS = Settings(max_items_per_request=4)
URI = "data:image/png;base64,AAAA"
URL_PART = {"type": "image_url", "image_url": {"url": URI}}


def parse(**fields: Any) -> EncodedRequest:
    return parse_embeddings(fields, SETTINGS)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("a", [(Text("a"),)]),
        (["a", "b"], [(Text("a"),), (Text("b"),)]),
        (URI, [(Image(URI),)]),
        (["a", URI], [(Text("a"),), (Image(URI),)]),
        ("data:video/mp4;base64,AAAA", [(Video("data:video/mp4;base64,AAAA"),)]),
        ([{"text": "a"}, {"image": "AAAA"}], [(Text("a"),), (Image("AAAA"),)]),
        ({"text": "a", "image": "AAAA"}, [(Image("AAAA"), Text("a"))]),
        ({"content": [{"type": "input_text", "text": "a"}, URL_PART]}, [(Text("a"), Image(URI))]),
        ({"content": "a"}, [(Text("a"),)]),
        (URL_PART, [(Image(URI),)]),
        ([{"type": "text", "text": "a"}, URL_PART], [(Text("a"),), (Image(URI),)]),
    ],
)
def test_every_form_of_input_becomes_items(value: Any, parts: list[Any]) -> None:
    assert [item.parts for item in parse(input=value).items] == parts


@pytest.mark.parametrize("value", [{"text": URI}, {"content": URI}, [{"type": "text", "text": URI}]])
def test_data_uri_that_is_said_to_be_a_text_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"text: got a data URI with base64, .* Send a picture as `image`"):
        parse(input=value)


def test_sampling_rate_of_a_request_applies_to_its_videos_only() -> None:
    clip = "data:video/mp4;base64,AAAA"
    part = {"type": "video_url", "video_url": {"url": clip}}
    value = ["a", clip, {"video": clip, "fps": 3}, {"content": [{"type": "text", "text": "a"}, part]}]
    items = parse(input=value, mm_processor_kwargs={"fps": 2}).items
    assert [item.parts for item in items] == [
        (Text("a"),),
        (Video(clip, 2),),
        (Video(clip, 3),),
        (Text("a"), Video(clip, 2)),
    ]
    (item,) = parse(messages=[{"role": "user", "content": [part]}], mm_processor_kwargs={"fps": 0.5}).items
    assert item.parts == (Video(clip, 0.5),)


@pytest.mark.parametrize("fps", ["2", 0, True, [1]])
def test_sampling_rate_that_is_none_is_refused_whatever_is_embedded(fps: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^fps: got .*; allowed: a number from 0\.01 to 1000$"):
        parse(input="a", mm_processor_kwargs={"fps": fps})


def test_conversation_is_one_item_and_a_list_of_them_several() -> None:
    user = {"role": "user", "content": [URL_PART, {"type": "text", "text": "a"}]}
    system = {"role": "system", "content": "Find."}
    item = EmbeddingItem((Image(URI), Text("a")), "Find.")
    last = {"role": "assistant", "content": ""}
    extras = {"add_generation_prompt": False, "continue_final_message": True, "add_special_tokens": True}
    assert parse(messages=[system, user, last], **extras).items == (item,)
    without_instruction = EmbeddingItem((Image(URI), Text("a")))
    as_mteb = parse(messages=[[system, user], [user]], truncate_prompt_tokens=8192)
    assert as_mteb.items == (item, without_instruction)


def test_options_of_openai_and_of_the_service_are_accepted() -> None:
    request = parse(input="a", model="x", dimensions=64, encoding_format="base64", user="me", provider={}, priority=1)
    assert request == EncodedRequest((EmbeddingItem((Text("a"),), None, 64),), Encoding("base64"))
    ours = parse(input="a", instruction="Find.", normalize=False, truncate="none", output_dtype="float16")
    item = EmbeddingItem((Text("a"),), "Find.", normalize=False, truncate="none")
    assert ours == EncodedRequest((item,), Encoding("float", "float16"))


def test_instruction_of_the_item_precedes_that_of_the_request_and_of_queries() -> None:
    entries = [{"text": "a", "instruction": "Mine."}, "b"]
    assert [item.instruction for item in parse(input=entries, instruction="All.", task="retrieval.query").items] == [
        "Mine.",
        "All.",
    ]
    assert [item.instruction for item in parse(input=entries, input_type="search_query").items] == [
        "Mine.",
        QUERY_INSTRUCTION,
    ]
    assert parse(input="b", input_type="search_document").items[0].instruction is None


@pytest.mark.parametrize("value", [[1, 2], [[1, 2], [3]], [[1], "a"]])
def test_error_for_token_ids_names_the_clients_option(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"got token ids; .* OpenAIEmbeddings\(check_embedding_ctx_length=False\)"):
        parse(input=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either `input` or `messages`"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "give either `input` or `messages`"),
        ({"input": []}, "input: got an empty list; allowed: at least one item"),
        ({"input": 5}, "input: got 5 (a number); allowed: a string, an object, or a list of them"),
        ({"input": ["a", 5]}, "item 1: got 5 (a number); allowed: a text, or an object with text, image, video or"),
        ({"input": ["a", ["b"]]}, "item 1: got ['b'] (a list); allowed: "),
        ({"input": ["a", {"txt": "b"}]}, "item 1: unknown field: txt"),
        (
            {"input": {"text": "a", "content": "b"}},
            "item 0: got `content` and `text`/`image`/`video`; allowed: one of the two forms",
        ),
        ({"input": [{}]}, "item 0: an item needs at least one of text, image or video; got none"),
        ({"messages": []}, "messages: got [] (a list); allowed: a list of at least one message"),
        ({"messages": "a"}, "messages: got 'a' (a string); allowed: a list of at least one message"),
        ({"messages": [{"role": "system", "content": "a"}]}, "item 0: an item needs at least one of text, image or"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format: got 'hex' (a string); input should be"),
        ({"input": "a", "input_type": "other"}, "input_type: got 'other' (a string); input should be 'search_query', "),
        ({"input": "a", "chat_template": "{{ x }}"}, "unknown field: chat_template"),
        (
            {"input": "a", "truncate_prompt_tokens": 8193},
            "truncate_prompt_tokens: got 8193; allowed: -1, or from 1 to 8192",
        ),
        ({"input": "a", "output_dtype": "int8", "normalize": False}, "item 0: output_dtype: got int8 with normalize"),
    ],
)
def test_error_names_the_value_received_and_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert str(caught.value).startswith(message)


def test_too_many_items_are_refused() -> None:
    with pytest.raises(RequestTooLarge, match="got 5 items; allowed: 1 to 4"):
        parse(input=list("abcde"))


def test_response_has_openais_form() -> None:
    request = parse(input=["a", "b"], output_dtype="int8")
    vectors = [np.array([1.0, 0.0], np.float32), np.array([0.0, -1.0], np.float32)]
    embeddings = [Embedding(vector, 50 + 51 * index, 4 * index) for index, vector in enumerate(vectors)]
    clock_offset_s = 1000 - time.monotonic()
    response = embeddings_response(request, embeddings, ServedModel("the model", 101, clock_offset_s=clock_offset_s))
    assert isinstance(response, bytes)
    body = json.loads(response)
    EmbeddingsResponse.model_validate(body)
    assert body.pop("id").startswith("embd-")
    assert body.pop("created") in range(1000, 1060)
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [127, 0]},
            {"object": "embedding", "index": 1, "embedding": [0, -127]},
        ],
        "model": "the model",
        "usage": {"prompt_tokens": 151, "total_tokens": 151, "completion_tokens": 0},
        "warnings": ["item 1: got 105 tokens; allowed: 101; its text was cut by 4 tokens"],
    }


def test_models_lists_the_model_with_its_token_limit() -> None:
    body = json.loads(models_response([ServedModel("the model", 8192)], 1234.5))
    (card,) = ModelsResponse.model_validate(body, strict=True).data
    assert (card.id, card.created, card.max_model_len) == ("the model", 1234, 8192)


@pytest.mark.parametrize(
    ("error", "kind", "param"),
    [
        (InvalidRequest("m", item=3), "invalid_request_error", "input[3]"),
        (Overloaded("m", retry_after_s=1), "rate_limit_error", None),
        (EngineFailed("m", item=0), "server_error", "input[0]"),
    ],
)
def test_error_has_openais_form_and_the_services_code(error: Any, kind: str, param: str | None) -> None:
    body = json.loads(openai_error_body(error))
    fields = {"message": str(error), "type": kind, "param": param, "code": error.code}
    assert body == {"error": fields, "detail": str(error), "message": str(error)}
    OpenAIErrorResponse.model_validate(body, strict=True)
