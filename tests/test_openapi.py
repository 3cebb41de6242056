"""The document is valid, says what the routes take, and what the benchmark's client looks for."""

from __future__ import annotations

from typing import Any

import openapi_spec_validator
import pytest

from embedder.openapi import ERRORS, openapi_document
from embedder.request import ImageRequest, TextRequest
from embedder.settings import Settings

DOCUMENT = openapi_document(Settings(max_items_per_request=7), "1.2.3")
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
    openapi_spec_validator.validate(DOCUMENT)
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"]["version"] == "1.2.3"


@pytest.mark.parametrize("path", ROUTES)
def test_input_takes_a_list_of_at_most_the_settings_number(path: str) -> None:
    options = resolve(body_schema(path)["properties"]["input"])["anyOf"]
    assert {"type": "string"} in options
    (array,) = (option for option in options if option.get("type") == "array")
    assert (array["minItems"], array["maxItems"], array["items"]) == (1, 7, {"type": "string"})


def test_another_limit_makes_another_document() -> None:
    schemas = openapi_document(Settings(max_items_per_request=9), "1")["components"]["schemas"]
    assert [option.get("maxItems") for option in schemas["TextRequest"]["properties"]["input"]["anyOf"]] == [None, 9]
    assert openapi_document(Settings(max_items_per_request=7), "1.2.3") == DOCUMENT


@pytest.mark.parametrize(("path", "model"), [("/txt/embed", TextRequest), ("/img/embed", ImageRequest)])
def test_fields_are_those_of_the_wire_and_no_other(path: str, model: Any) -> None:
    schema = body_schema(path)
    assert set(schema["properties"]) == set(model.model_fields)
    assert schema["required"] == ["input"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", ROUTES)
def test_examples_are_bodies_that_are_accepted(path: str) -> None:
    model = TextRequest if path == "/txt/embed" else ImageRequest
    for example in body_schema(path)["properties"]["input"]["examples"]:
        assert model.model_validate({"input": example}).input == example


def test_every_reference_leads_somewhere() -> None:
    found = references(DOCUMENT)
    assert {resolve({"$ref": reference})["title"] for reference in found} >= {"TextRequest", "EmbeddingResponse"}


@pytest.mark.parametrize("path", [*ROUTES, "/embed_texts", "/embed_images"])
def test_every_error_has_the_one_body(path: str) -> None:
    responses = DOCUMENT["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", *map(str, ERRORS)}
    for status in ERRORS:
        schema = responses[str(status)]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorResponse"}


def test_embedding_may_be_floats_or_base64_once_or_in_a_list() -> None:
    schema = DOCUMENT["components"]["schemas"]["EmbeddingResponse"]["properties"]["embedding"]
    numbers, text = {"type": "array", "items": {"type": "number"}}, {"type": "string"}
    assert schema["anyOf"] == [numbers, text, {"type": "array", "items": {"anyOf": [numbers, text]}}]
