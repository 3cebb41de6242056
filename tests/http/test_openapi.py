"""The document is valid, says what the routes take, and what the benchmark's client looks for."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest

from embedder.errors import InvalidRequest
from embedder.http.accepted_fields import ACCEPTED
from embedder.http.dialects import rerank
from embedder.http.dialects.dialect import choose_dialect
from embedder.http.dialects.local import ImageForm, ImageRequest, TextRequest
from embedder.http.error_forms import error_form
from embedder.http.openapi import error_meanings, openapi_document
from embedder.http.routes import DIALECTS, EXAMPLES
from embedder.settings import Settings

DOCUMENT = openapi_document(DIALECTS, Settings(max_items_per_request=7), "1.2.3")
ROUTES = ["/txt/embed", "/img/embed"]


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    """Follow `$ref` as the benchmark's client does."""
    while "$ref" in schema:
        place: Any = DOCUMENT
        for key in schema["$ref"].removeprefix("#/").split("/"):
            place = place[key]
        schema = place
    return schema


def body_schema(path: str) -> dict[str, Any]:
    return resolve(DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_document_is_valid_openapi() -> None:
    import openapi_spec_validator

    openapi_spec_validator.validate(DOCUMENT)
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"]["version"] == "1.2.3"


def test_keys_are_described_where_they_are_needed() -> None:
    import openapi_spec_validator

    closed = openapi_document(DIALECTS, Settings(), "1", needs_key=True)
    openapi_spec_validator.validate(closed)
    assert closed["security"] == [{"bearer": []}, {"header": []}]
    assert {scheme["type"] for scheme in closed["components"]["securitySchemes"].values()} == {"http", "apiKey"}
    assert closed["paths"]["/health"]["get"]["security"] == []
    assert DOCUMENT["security"] == [{}]


def test_every_operation_is_in_a_group_with_a_description() -> None:
    dialects = (*DIALECTS, *rerank.RERANKING)
    document = openapi_document(dialects, Settings(batch_folder="/batches", model="bundled", reranker="any"), "1")
    operations = [one for path in document["paths"].values() for name, one in path.items() if name != "parameters"]
    described = [tag["name"] for tag in document["tags"] if tag["description"]]
    assert {tag for one in operations for tag in one["tags"]} == set(described)
    assert all(len(one["tags"]) == 1 for one in operations)
    assert described[:2] == ["Embed", "OpenAI"]
    assert {tag["name"] for tag in DOCUMENT["tags"]} == set(described) - {"Rerank", "Batches"}


def test_routes_with_an_id_say_that_it_may_not_exist() -> None:
    document = openapi_document(DIALECTS, Settings(batch_folder="/batches"), "1")
    for path, operations in document["paths"].items():
        for method in {"get", "post", "delete"} & set(operations):
            assert ("404" in operations[method]["responses"]) == ("{id}" in path)


def test_batches_are_described_where_the_operator_allows_them() -> None:
    import openapi_spec_validator

    document = openapi_document(DIALECTS, Settings(batch_folder="/batches"), "1")
    openapi_spec_validator.validate(document)
    assert set(document["paths"]) - set(DOCUMENT["paths"]) == {
        *("/v1/files", "/v1/files/{id}", "/v1/files/{id}/content"),
        *("/v1/batches", "/v1/batches/{id}", "/v1/batches/{id}/cancel"),
    }


@pytest.mark.parametrize("path", ROUTES)
def test_input_list_is_limited_by_the_setting(path: str) -> None:
    options = resolve(body_schema(path)["properties"]["input"])["anyOf"]
    assert {"type": "string"} in options
    (array,) = (option for option in options if option.get("type") == "array")
    assert (array["minItems"], array["maxItems"], array["items"]) == (1, 7, {"type": "string"})


def test_limit_in_the_document_follows_the_setting() -> None:
    schemas = openapi_document(DIALECTS, Settings(max_items_per_request=9), "1")["components"]["schemas"]
    assert [option.get("maxItems") for option in schemas["TextRequest"]["properties"]["input"]["anyOf"]] == [None, 9]
    assert openapi_document(DIALECTS, Settings(max_items_per_request=7), "1.2.3") == DOCUMENT


@pytest.mark.parametrize(("path", "model"), [("/txt/embed", TextRequest), ("/img/embed", ImageRequest)])
def test_fields_are_those_of_the_wire_and_no_other(path: str, model: Any) -> None:
    schema = body_schema(path)
    assert set(schema["properties"]) == set(model.model_fields) | set(ACCEPTED)
    assert schema["required"] == ["input"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", ROUTES)
def test_examples_are_bodies_that_are_accepted(path: str) -> None:
    model = TextRequest if path == "/txt/embed" else ImageRequest
    for example in body_schema(path)["properties"]["input"]["examples"]:
        assert model.model_validate({"input": example}).input == example


def test_every_reference_exists() -> None:
    found = references(DOCUMENT)
    assert {resolve({"$ref": reference})["title"] for reference in found} >= {"TextRequest", "EmbeddingResponse"}


@pytest.mark.parametrize("path", EXAMPLES)
def test_every_error_refers_to_the_services_or_openais_form(path: str) -> None:
    has_tei = path in ("/embed", "/invocations")
    bodies = {error_form(path).schema.__name__} | ({"PlainErrorResponse"} if has_tei else set())
    responses = DOCUMENT["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", *map(str, error_meanings())}
    for status in error_meanings():
        schema = responses[str(status)]["content"]["application/json"]["schema"]
        found = {one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema])}
        assert found == bodies


def test_embedding_may_be_floats_or_base64_once_or_in_a_list() -> None:
    schema = DOCUMENT["components"]["schemas"]["EmbeddingResponse"]["properties"]["embedding"]
    numbers, text = {"type": "array", "items": {"type": "number"}}, {"type": "string"}
    assert schema["anyOf"] == [numbers, text, {"type": "array", "items": {"anyOf": [numbers, text]}}]


def is_valid(path: str, body: Any) -> bool:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    return bool(validator.is_valid(body))


def parse(path: str, body: Any, settings: Settings = Settings(max_items_per_request=7)) -> Any:  # noqa: B008
    """As the routes do: of several dialects on one path, the body's fields decide."""
    dialects = [one for one in DIALECTS if one.path == path]
    return choose_dialect(dialects, body).parse(body, settings)


def test_every_post_route_is_described_with_examples_that_its_own_schema_allows() -> None:
    assert {path for path, methods in DOCUMENT["paths"].items() if "post" in methods} == set(EXAMPLES)
    for path, examples in EXAMPLES.items():
        for name, body in examples.items():
            assert is_valid(path, body), (path, name)


def test_operation_ids_are_unique_identifiers() -> None:
    names = [method["operationId"] for methods in DOCUMENT["paths"].values() for method in methods.values()]
    assert len(set(names)) == len(names) == len(DOCUMENT["paths"])
    assert all(name.isidentifier() for name in names)


TEXT_PART = {"type": "text", "text": "a"}
URL_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USER = {"role": "user", "content": [TEXT_PART, URL_PART]}
CHAT_INPUTS: list[Any] = [
    "a",
    ["a", "b"],
    {"text": "a"},
    [{"text": "a", "image": "AAAA"}, "b"],
    {"text": "a", "instruction": "Find.", "dimensions": 64},
    {"content": [TEXT_PART, URL_PART]},
    [{"content": "a"}],
    TEXT_PART,
    [URL_PART, {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"}],
    {"type": "input_video", "input_video": {"data": "AAAA", "format": "mp4"}},
    {"content": [{"type": "video", "video": ["AAAA", "BBBB"], "fps": 1}]},
    {"video": ["AAAA", "BBBB"], "fps": 1},
    # invalid
    5,
    [],
    [1, 2],
    [[1, 2]],
    [["a"]],
    {},
    {"txt": "a"},
    {"content": [{"type": "audio", "audio": "AAAA"}]},
    {"content": [{**URL_PART, "max_pixels": 5}]},
    {"text": "a", "id": "b"},
    ["a"] * 8,
]
BODIES: list[tuple[str, Any]] = [
    *(("/v1/embeddings", {"input": value}) for value in CHAT_INPUTS),
    *(
        ("/v1/embeddings", {"messages": value})
        for value in (
            [USER],
            [[USER], [USER]],
            [{"role": "system", "content": "Find."}, USER, {"role": "assistant", "content": ""}],
            [],
            [{"role": "tool", "content": "a"}],
            [{"role": "user", "content": 5}],
            [{**USER, "cost": 1}],
        )
    ),
    ("/v1/embeddings", {"input": "a", "instrction": "b"}),
    ("/v1/embeddings", {"input": "a", "encoding_format": "bytes"}),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}),
    ("/v1/embeddings", {"input": "a", "truncate": True, "output_dtype": "float", "embedding_type": "int8"}),
    ("/embed", {"inputs": "a", "truncate": True}),
    ("/v2/embed", {"texts": ["a"], "truncate": "NONE", "input_type": "clustering", "priority": 1}),
    ("/v2/embed", {"images": ["AAAA"], "embedding_types": ["float"]}),
    ("/v2/embed", {"inputs": [{"content": [TEXT_PART, URL_PART]}]}),
    ("/v2/embed", {"texts": []}),
    ("/v2/embed", {"texts": "a"}),
    ("/v2/embed", {"inputs": [{"content": [TEXT_PART], "id": 1}]}),
    ("/v2/embed", {"inputs": [{"text": "a"}]}),
    ("/v2/embed", {"texts": ["a"], "embedding_types": ["float16"]}),
    ("/embed", {"items": ["a"], "normalize": False}),
    ("/embed", {"items": []}),
    ("/embed", {"items": "a"}),
    ("/embed", {"items": ["a"] * 8}),
    ("/embed", {"input": ["a"]}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_document_accepts_the_bodies_that_the_parser_accepts(path: str, body: Any) -> None:
    try:
        parse(path, body)
    except InvalidRequest:
        assert not is_valid(path, body)
    else:
        assert is_valid(path, body)


@pytest.mark.parametrize(
    ("entry", "is_good"),
    [
        ("a", True),
        ({"text": "a", "id": 5}, True),
        ({"text": ["a", "b"], "image": "AAAA", "truncate": "none"}, True),
        ({"content": [TEXT_PART, {"type": "image", "image": "AAAA"}], "normalize": False}, True),
        ({"content": TEXT_PART}, True),
        ({"video": ["AAAA"], "fps": 2.0}, True),
        (5, False),
        ({}, False),
        ({"id": "a"}, False),
        ({"text": 5}, False),
        ({"text": "a", "id": True}, False),
        ({"text": "a", "txt": "b"}, False),
        ({"content": [URL_PART]}, False),
        ({"text": "a", "normalize": "no"}, False),
        ({"text": "a", "truncate": "middle"}, False),
    ],
)
def test_document_accepts_the_items_that_the_parser_accepts(entry: Any, is_good: bool) -> None:
    (item,) = parse("/embed", {"items": [entry]}).items
    assert isinstance(item, InvalidRequest) is not is_good
    assert is_valid("/embed", {"items": [entry]}) is is_good


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda one: one.path)
def test_null_means_the_same_as_leaving_a_field_out_on_every_route(dialect: Any) -> None:
    """LiteLLM, Dify and many generated clients send nulls; the document allows them."""
    schema = resolve({"$ref": f"#/components/schemas/{dialect.request.__name__}"})
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    example = next(iter(dialect.examples.values()))
    names = set(schema["properties"]) - set(schema.get("required", ())) - set(example)
    assert len(names) >= 5
    plain = dialect.parse(example, Settings())
    for given in [{name: None} for name in sorted(names)] + [dict.fromkeys(names)]:
        validator.validate({**example, **given})
        assert dialect.parse({**example, **given}, Settings()) == plain


NULLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("/embed", {"items": [{"text": "red"}]}, {"items": [dict.fromkeys(["image", "video", "content", "fps"])]}),
    (
        "/embed",
        {"items": [{"text": "red"}]},
        {"items": [dict.fromkeys(["instruction", "normalize", "truncate", "id"])]},
    ),
    (
        "/embed",
        {"items": [{"content": [{"type": "text", "text": "red"}]}]},
        {"items": [{"content": [{"image": None, "fps": None}]}]},
    ),
    ("/v1/embeddings", {"input": [{"text": "red"}]}, {"input": [dict.fromkeys(["content", "image", "normalize"])]}),
    (
        "/v1/embeddings",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "red"}]}]},
        {"messages": [{"name": None, "tool_calls": None, "content": [{"image_url": None, "detail": None}]}]},
    ),
    (
        "/v1/embeddings",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "aGVsbG8="}}]}]},
        {"messages": [{"content": [{"image_url": {"detail": None, "format": None}}]}]},
    ),
    (
        "/v2/embed",
        {"inputs": [{"content": [{"type": "text", "text": "red"}]}]},
        {"inputs": [{"content": [{"image_url": None}]}]},
    ),
]


@pytest.mark.parametrize(("path", "body", "nulls"), NULLS)
def test_null_inside_items_parts_and_messages_means_not_given(
    path: str, body: dict[str, Any], nulls: dict[str, Any]
) -> None:
    plain = parse(path, body, Settings())
    assert parse(path, merged(nulls, body), Settings()) == plain
    assert not any(isinstance(item, Exception) for item in plain.items)


def merged(under: Any, over: Any) -> Any:
    """Merge two JSON values of the same shape; `over` takes precedence."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {name: merged(under.get(name), over.get(name)) for name in {**under, **over}}
    if isinstance(under, list) and isinstance(over, list):
        return [merged(one, other) for one, other in zip(under, over, strict=True)]
    return under if over is None else over


def test_form_and_file_are_described_where_they_are_taken() -> None:
    for path, methods in DOCUMENT["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        assert (set(content) > {"application/json"}) == (path == "/img/embed")
    content = DOCUMENT["paths"]["/img/embed"]["post"]["requestBody"]["content"]
    form = resolve(content["multipart/form-data"]["schema"])
    assert form["required"] == ["image"]
    assert set(form["properties"]) == set(ImageForm.model_fields) | set(ACCEPTED)
    assert form["properties"]["image"]["items"] == content["application/octet-stream"]["schema"]
    assert form["properties"]["image"]["maxItems"] == 7
