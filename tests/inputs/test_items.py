"""Bodies and mappings become items; an item that exists is valid; errors name the value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from embedder.errors import InvalidMedia, InvalidRequest, RequestTooLarge, UnsupportedDimensions
from embedder.http.accepted_fields import ACCEPTED
from embedder.http.dialects import embed
from embedder.http.dialects.cohere import parse_cohere
from embedder.http.dialects.embed import parse_embed
from embedder.http.dialects.local import parse_image_request, parse_text_request
from embedder.http.dialects.openai import parse_embeddings
from embedder.http.request_body import EmbeddingRequest, read_json
from embedder.http.response import error_body
from embedder.inputs.image import load_image
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, Text, Video, describe_value, item_from_fields
from embedder.inputs.regimes import ReferenceRegime
from embedder.settings import Settings

SETTINGS = Settings(max_items_per_request=3)
Parse = Callable[[Mapping[str, Any], Settings], EmbeddingRequest]
BOTH = pytest.mark.parametrize("parse", [parse_text_request, parse_image_request])


def parse_text(**fields: Any) -> EmbeddingRequest:
    return parse_text_request(fields, SETTINGS)


def test_string_is_one_item_with_the_defaults() -> None:
    item = EmbeddingItem((Text("red"),), instruction=None, dimensions=None, normalize=True)
    assert parse_text(input="red") == EmbeddingRequest((item,), is_list=False, encoding_format="float")


def test_image_route_makes_images() -> None:
    request = parse_image_request({"input": ["AAAA", "BBBB"]}, SETTINGS)
    assert [item.parts for item in request.items] == [(Image("AAAA"),), (Image("BBBB"),)]


def test_list_of_one_is_still_a_list() -> None:
    assert parse_text(input=["red"]).is_list
    assert parse_text(input=["red"]).items == parse_text(input="red").items


def test_list_keeps_its_order() -> None:
    assert [item.parts for item in parse_text(input=["b", "a", "c"]).items] == [
        (Text("b"),),
        (Text("a"),),
        (Text("c"),),
    ]


def test_options_go_to_every_item() -> None:
    options = {"instruction": "Find.", "dimensions": 64, "normalize": False, "encoding_format": "base64"}
    request = parse_text(input=["a", "b"], **options)
    assert {(item.instruction, item.dimensions, item.normalize) for item in request.items} == {("Find.", 64, False)}
    assert request.encoding_format == "base64"


@BOTH
@pytest.mark.parametrize("name", ["input", "inputs", "content", "contents"])
def test_input_has_synonyms(parse: Parse, name: str) -> None:
    assert parse({name: ["a"]}, SETTINGS) == parse({"input": ["a"]}, SETTINGS)


@pytest.mark.parametrize("name", ["dimensions", "dim", "dimension", "output_dimension"])
def test_dimensions_have_synonyms(name: str) -> None:
    assert parse_text(input="a", **{name: 64}).items[0].dimensions == 64


@pytest.mark.parametrize("fields", [{"input": "a", "inputs": ["b"]}, {"input": "a", "dim": 64, "dimensions": 128}])
def test_two_names_for_one_field_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"^unknown field: (inputs|dim) \(did you mean"):
        parse_text(**fields)


@BOTH
def test_unknown_fields_are_named(parse: Parse) -> None:
    with pytest.raises(InvalidRequest, match=r"^unknown fields: instrction \(did you mean instruction\?\), zz$"):
        parse({"input": 5, "instrction": "x", "zz": 1}, SETTINGS)


@BOTH
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "input: missing"),
        ({"input": None}, "input: missing"),
        ({"input": 3}, "input: got 3 (a number); allowed: a string or a list of strings"),
        ({"input": 2.5}, "input: got 2.5 (a number); allowed: a string or a list of strings"),
        ({"input": True}, "input: got true (a boolean); allowed: a string or a list of strings"),
        ({"input": {"a": 1}}, "input: got {'a': 1} (an object); allowed: a string or a list of strings"),
        ({"input": []}, "input: got an empty list; allowed: at least one item"),
        ({"contents": []}, "contents: got an empty list; allowed: at least one item"),
        ({"input": ["a", 3]}, "input[1]: got 3 (a number); input should be a valid string"),
        ({"inputs": [None]}, "inputs[0]: got null; input should be a valid string"),
        ({"input": ["a", ["b"]]}, "input[1]: got ['b'] (a list); input should be a valid string"),
        ({"input": ["a", {"text": "b"}]}, "input[1]: got {'text': 'b'} (an object); input should be a valid string"),
        ({"input": "a", "instruction": 5}, "instruction: got 5 (a number); input should be a valid string"),
        ({"input": "a", "instruction": ["x"]}, "instruction: got ['x'] (a list); input should be a valid string"),
        ({"input": "a", "normalize": 1}, "normalize: got 1 (a number); input should be a valid boolean"),
        (
            {"input": "a", "encoding_format": "hex"},
            "encoding_format: got 'hex' (a string); input should be 'float' or 'base64'",
        ),
        (
            {"input": "a", "encoding_format": []},
            "encoding_format: got [] (a list); input should be 'float' or 'base64'",
        ),
    ],
)
def test_wrong_type_names_the_place_the_value_and_what_is_allowed(
    parse: Parse, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(fields, SETTINGS)
    assert str(caught.value) == message


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_text(input=[["x" * 1000]])
    assert str(caught.value).startswith("input[0]: got ['xxxx")
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("value", ["64", 0, -1, 1.5, True, [64]])
def test_dimensions_that_are_not_a_positive_whole_number_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedDimensions, match=r"^item 0: dimensions: got .*; allowed: a positive whole number"):
        parse_text(input="a", dimensions=value)


@pytest.mark.parametrize("value", [1, 63, 10**6])
def test_range_of_dimensions_is_left_to_the_engine(value: int) -> None:
    assert parse_text(input="a", dimensions=value).items[0].dimensions == value


@pytest.mark.parametrize("text", ["a\ud800", "\udc00", "\ud800" * 2])
def test_text_or_instruction_with_a_lone_surrogate_cannot_exist(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^text holds a lone surrogate, which is not Unicode text: '\\ud"):
        Text(text)
    with pytest.raises(InvalidRequest, match=r"^instruction holds a lone surrogate, which is not Unicode text: '\\ud"):
        EmbeddingItem((Text("a"),), text)


@pytest.mark.parametrize("text", ["\ue000", "\U0001f600", "\x00", "\uffff", ""])
def test_other_unicode_is_a_text(text: str) -> None:
    assert Text(text).text == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parts": ()}, "an item needs at least one of text, image or video; got none"),
        ({"parts": (Text(""),)}, "text is empty; allowed: at least one character"),
        ({"parts": (Text(""), Text(""))}, "text is empty; allowed: at least one character"),
        ({"instruction": 5}, "instruction: got 5 (a number); allowed: a string"),
        (
            {"dimensions": True},
            "dimensions: got true (a boolean); allowed: a positive whole number, at most the model's ",
        ),
        (
            {"dimensions": 64.0},
            "dimensions: got 64.0 (a number); allowed: a positive whole number, at most the model's ",
        ),
        ({"normalize": 1}, "normalize: got 1 (a number); allowed: true or false"),
        ({"truncate": "END"}, "truncate: got 'END' (a string); allowed: end, start, none"),
        ({"truncate": []}, "truncate: got [] (a list); allowed: end, start, none"),
    ],
)
def test_invalid_item_cannot_exist(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EmbeddingItem(**{"parts": (Text("a"),), **fields})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("source", [None, 5, ["AAAA"], {}, Path("a.png")])
def test_source_of_another_type_cannot_be_an_image_or_video(source: Any) -> None:
    with pytest.raises(
        InvalidMedia, match=r"^image: got .*; allowed: base64, a data URI, a URL, bytes or a PIL image$"
    ):
        Image(source)
    with pytest.raises(InvalidMedia, match=r"^video: got .*; allowed: .*, bytes or a list of frames$"):
        Video(source)
    with pytest.raises(InvalidMedia, match=r"^image: got "):
        Video(("AAAA", source))


def test_bad_item_costs_only_itself_on_embed_and_is_named_elsewhere() -> None:
    body = {"items": [{"text": "a"}, {"text": "b", "dimensions": "c"}, {"text": ""}]}
    good, wrong_dimensions, empty = parse_embed(body, SETTINGS).items
    assert isinstance(good, EmbeddingItem)
    assert isinstance(wrong_dimensions, UnsupportedDimensions)
    assert isinstance(empty, InvalidRequest)
    for parse, fields in (
        (parse_text_request, {"input": ["a", ""]}),
        (parse_embeddings, {"input": ["a", ""]}),
        (parse_cohere, {"texts": ["a", ""]}),
    ):
        with pytest.raises(InvalidRequest, match=r"^item 1: text is empty; allowed: at least one character$"):
            parse(fields, SETTINGS)


def test_lone_surrogate_costs_only_its_item_on_embed() -> None:
    """orjson refuses a JSON body with one, so that the entry is parsed directly here."""
    request = embed.EmbedRequest(items=["a"])
    for entry in ("a\ud800", {"text": "a\ud800"}, {"text": "a", "instruction": "\udc00"}):
        _, item = embed._parse_entry(entry, request)
        assert isinstance(item, InvalidRequest)
        assert "lone surrogate" in item.message


@BOTH
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"input=red",
        b'{"input": NaN}',
        b'{"input": "a", "dimensions": NaN}',
        b'{"input": "a", "dimensions": Infinity}',
        b'{"input": "\xff"}',
        b'{"input": "a"} {}',
        b"[" * 5000 + b"]" * 5000,
    ],
)
def test_body_that_is_not_json_is_refused(parse: Parse, body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^the body is not valid JSON: "):
        parse(read_json(body), SETTINGS)


@pytest.mark.parametrize(
    ("body", "kind"), [(b"[]", "a list"), (b'"a"', "a string"), (b"3", "a number"), (b"null", "null")]
)
def test_body_must_be_an_object(body: bytes, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^the body must be a JSON object, got {kind}$"):
        parse_text_request(read_json(body), SETTINGS)


@pytest.mark.parametrize("text", [rb"\ud800", rb"a\udc00", rb"\ud800\u0041", b"\xed\xa0\x80"])
def test_lone_surrogate_costs_its_item_only(text: bytes) -> None:
    good, bad, other = parse_embed(
        read_json(b'{"items": ["red", {"text": "%s", "id": 5}, {"image": "AAAA"}]}' % text), SETTINGS
    ).items
    assert good == EmbeddingItem((Text("red"),))
    assert isinstance(bad, InvalidRequest)
    assert str(bad).startswith("text holds a lone surrogate, which is not Unicode text: '\\ud")
    assert other == EmbeddingItem((Image("AAAA"),))
    for parse, body in [
        (parse_text_request, b'{"input": ["red", "%s"]}'),
        (parse_embeddings, b'{"input": ["red", "%s"]}'),
        (parse_cohere, b'{"texts": ["red", "%s"]}'),
    ]:
        with pytest.raises(InvalidRequest, match=r"^item 1: text holds a lone surrogate") as caught:
            parse(read_json(body % text), SETTINGS)
        assert caught.value.item == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (rb'{"items": ["\ud800", NaN]}', "the body is not valid JSON: "),
        (rb'{"items": ["\ud800"', "the body is not valid JSON: "),
        (rb'{"items": ["\ud800", ' + b"9" * 5000 + b"]}", "the body is not valid JSON: "),
        (rb'{"items": ["\ud800", ' + b"[" * 100_000 + b"]" * 100_000 + b"]}", "the body is not valid JSON: "),
        (rb'{"items": ["red"], "\ud800": 1}', "a field's name holds a lone surrogate"),
    ],
)
def test_body_with_a_surrogate_is_held_to_the_same_rules(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_embed(read_json(body), SETTINGS)
    assert str(caught.value).startswith(message)
    error_body(caught.value)  # can be sent


def test_id_with_a_lone_surrogate_is_refused_as_it_could_not_be_sent_back() -> None:
    (bad,) = parse_embed(read_json(rb'{"items": [{"text": "red", "id": "\ud800"}]}'), SETTINGS).items
    assert isinstance(bad, InvalidRequest)
    assert str(bad).startswith("id holds a lone surrogate")


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (parse_text_request, {"input": "a", "encoding_format": "Base64", "output_dtype": "INT8", "truncate": "NONE"}),
        (parse_embeddings, {"input": "a", "encoding_format": "BASE64", "input_type": "Query", "truncate": "Start"}),
        (parse_cohere, {"texts": ["a"], "embedding_types": ["Float", "INT8"], "truncate": "none"}),
        (parse_embed, {"items": [{"text": "a", "truncate": "NONE"}], "encoding_format": "FLOAT"}),
    ],
)
def test_option_words_may_be_in_any_letter_case(parse: Any, body: dict[str, Any]) -> None:
    usual = {"embedding_types": ["float", "int8"], "truncate": "NONE"} if "texts" in body else {}
    lower = {name: usual.get(name, value.lower() if isinstance(value, str) else value) for name, value in body.items()}
    if "items" in body:
        lower["items"] = [{"text": "a", "truncate": "none"}]
    assert parse(body, SETTINGS) == parse(lower, SETTINGS)


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (parse_text_request, {"input": "a", "dimensions": "64"}),
        (parse_text_request, {"input": "a", "normalize": "true"}),
        (parse_text_request, {"input": "a", "normalize": 1}),
        (parse_embeddings, {"input": "a", "truncate_prompt_tokens": "8192"}),
        (parse_cohere, {"texts": ["a"], "max_tokens": "8192"}),
        (parse_cohere, {"texts": ["a"], "output_dimension": "64"}),
        (parse_embeddings, {"input": {"video": ["AAAA"], "fps": "2"}}),
    ],
)
def test_number_within_a_string_is_refused_with_the_value(parse: Any, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"(dimensions?|normalize|tokens|fps): got ('\w+' \(a string\)|1 \(a num)"):
        parse(body, SETTINGS)


BOOLEAN = ("add_generation_prompt", "continue_final_message")  # as in vLLM, whose route checks them


@pytest.mark.parametrize("name", ACCEPTED)
def test_field_that_changes_nothing_is_accepted_on_every_route(name: str) -> None:
    for parse, body in [
        (parse_text_request, {"input": "a"}),
        (parse_embeddings, {"input": "a"}),
        (parse_embed, {"items": ["a"]}),
        (parse_cohere, {"texts": ["a"]}),
    ]:
        plain = parse(body, SETTINGS)
        assert parse({**body, name: True if name in BOOLEAN else {"any": "value"}}, SETTINGS) == plain


def test_escaped_surrogate_pair_is_one_character() -> None:
    body = json.dumps({"input": "\U0001f600"}).encode()
    assert rb"\ud83d\ude00" in body  # what json.dumps sends
    assert parse_text_request(read_json(body), SETTINGS).items[0].parts == (Text("\U0001f600"),)


@BOTH
def test_too_many_items_are_refused_with_the_limit(parse: Parse) -> None:
    assert len(parse({"input": ["a", "b", "c"]}, SETTINGS).items) == 3
    with pytest.raises(RequestTooLarge, match=r"^got 4 items; allowed: 1 to 3 \(EMBEDDER_MAX_ITEMS_PER_REQUEST\)$"):
        parse({"input": ["a", "b", "c", "d"]}, SETTINGS)


def test_example_image_of_the_contract_is_a_red_square() -> None:
    values = load_image(EXAMPLE_IMAGE, ReferenceRegime(max_pixels=4096), Settings())
    assert values.shape == (64, 64, 3)
    assert (values == (230, 30, 40)).all()


def test_native_order_is_video_image_text() -> None:
    item = item_from_fields({"text": ["t1", "t2"], "image": "i", "video": ["f1", "f2"]})
    assert item.parts == (Video(("f1", "f2")), Image("i"), Text("t1"), Text("t2"))


def test_content_keeps_the_callers_order() -> None:
    content = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": "i"},
        {"type": "text", "text": "b"},
        {"type": "video", "video": ["f"]},
    ]
    assert item_from_fields({"content": content}).parts == (Text("a"), Image("i"), Text("b"), Video(("f",)))


def test_single_part_needs_no_list() -> None:
    assert item_from_fields({"content": {"type": "text", "text": "a"}}).parts == (Text("a"),)


def test_list_of_frames_is_one_video_and_list_of_lists_several() -> None:
    assert item_from_fields({"video": ["a", "b"]}).parts == (Video(("a", "b")),)
    assert item_from_fields({"video": [["a"], ["b"]]}).parts == (Video(("a",)), Video(("b",)))
    assert item_from_fields({"video": Video(("a",), fps=1.0)}).parts == (Video(("a",), fps=1.0),)
    assert item_from_fields({"video": ["a", "b"], "fps": 1}).parts == (Video(("a", "b"), fps=1),)


def test_encoded_video_is_one_string_and_several_are_data_uris() -> None:
    clip = "data:video/mp4;base64,AAAA"
    assert item_from_fields({"video": "AAAA"}).parts == (Video("AAAA"),)
    assert item_from_fields({"video": b"bytes", "fps": 0.5}).parts == (Video(b"bytes", 0.5),)
    assert item_from_fields({"video": [clip, clip]}).parts == (Video(clip), Video(clip))
    assert item_from_fields({"video": [clip, ["a"]]}).parts == (Video(clip), Video(("a",)))
    content = [{"type": "video", "video": clip, "fps": 2}]
    assert item_from_fields({"content": content}).parts == (Video(clip, 2),)


def test_pil_images_and_bytes_pass_through() -> None:
    image = PIL.Image.new("RGB", (4, 4))
    assert item_from_fields({"image": [image, b"bytes"]}).parts == (Image(image), Image(b"bytes"))


def test_options_of_a_mapping_are_those_of_the_item() -> None:
    item = item_from_fields({"text": "a", "instruction": "Find.", "dimensions": 64, "normalize": False})
    assert item == EmbeddingItem((Text("a"),), "Find.", 64, normalize=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (5, "got 5 (a number); allowed: a text, or an object with text, image or content"),
        (None, "got null; allowed: a text, or an object with text, image or content"),
        ([], "got [] (a list); allowed: a text, or an object with text, image or content"),
        ({}, "an item needs at least one of text, image or video; got none"),
        ({"text": []}, "an item needs at least one of text, image or video; got none"),
        ({"content": []}, "an item needs at least one of text, image or video; got none"),
        ({"content": None}, "an item needs at least one of text, image or video; got none"),
        ({"txt": "a", "img": "b"}, "unknown fields: txt (did you mean text?), img (did you mean image?)"),
        ({"text": "a", 1: 2}, "unknown field: 1"),
        (
            {"text": "a", "content": []},
            "got `content` and `text`/`image`/`video`; allowed: one of the two forms",
        ),
        ({"text": 5}, "text: got 5 (a number); allowed: a string"),
        ({"text": b"a"}, "text: got b'a' (bytes); allowed: a string"),
        ({"text": ["a", None]}, "text: got null; allowed: a string"),
        ({"video": 5}, "video: got 5 (a number); allowed: base64, a data URI, a URL, bytes or a list of frames"),
        (
            {"video": [["a"], 5]},
            "video: got 5 (a number); allowed: base64, a data URI, a URL, bytes or a list of frames",
        ),
        ({"text": "a", "normalize": "no"}, "normalize: got 'no' (a string); allowed: true or false"),
        (
            {"content": ["a"]},
            "a part of `content`: got 'a' (a string); allowed: an object of type text, image or video",
        ),
        (
            {"content": [{"text": "a"}]},
            "a part of `content`: got {'text': 'a'} (an object); allowed: an object of type text, image or video",
        ),
        (
            {"content": [{"type": ["text"]}]},
            "a part of `content`: got {'type': ['text']} (an object); allowed: an object of type text, image or video",
        ),
        ({"content": [{"type": "text"}]}, "text: got null; allowed: a string"),
        (
            {"content": [{"type": "video"}]},
            "video: got null; allowed: base64, a data URI, a URL, bytes or a list of frames",
        ),
        ({"video": "a", "fps": 0}, "fps: got 0 (a number); allowed: a number from 0.01 to 1000"),
        ({"video": ["a"], "fps": True}, "fps: got true (a boolean); allowed: a number from 0.01 to 1000"),
        ({"text": "a", "fps": 1}, "unknown field: fps"),
        ({"text": "a", "truncate": "MIDDLE"}, "truncate: got 'middle' (a string); allowed: end, start, none"),
        ({"content": [{"type": "text", "text": "a", "txt": "b"}]}, "unknown field: txt (did you mean text?)"),
        ({"content": [{"type": "image", "image": "a", "max_pixels": 1}]}, "unknown field: max_pixels"),
    ],
)
def test_invalid_mapping_names_the_value_and_what_is_allowed(fields: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        item_from_fields(fields)
    assert str(caught.value) == message


def test_part_without_its_image_is_an_error_of_the_caller() -> None:
    with pytest.raises(InvalidMedia, match=r"^image: got null; allowed: base64, a data URI, a URL, bytes or a PIL"):
        item_from_fields({"content": [{"type": "image"}]})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "true (a boolean)"),
        (None, "null"),
        ([True, {"a": None}], "[true, {'a': null}] (a list)"),
        ("True", "'True' (a string)"),
        (1.5, "1.5 (a number)"),
    ],
)
def test_values_in_messages_are_those_of_json(value: Any, shown: str) -> None:
    assert describe_value(value) == shown
