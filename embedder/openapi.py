"""The wire models -> the OpenAPI document of the HTTP contract.

Written here because BentoML's generator shows only the first member of a union, and clients read from `input` whether
lists are accepted, and how long (`anyOf` with `maxItems`).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from embedder.request import ImageRequest, TextRequest
from embedder.response import EmbeddingResponse, ErrorResponse
from embedder.settings import Settings

ERRORS = {
    400: "The request says something that cannot be done; `message` names what was got and what is allowed.",
    413: "The body, the number of items, or an image is over a limit.",
    415: "The body is not JSON.",
    429: "The queue is full; `Retry-After` says when to come back.",
    500: "The item could not be embedded; the service's log has the reason.",
    503: "The service is starting or shutting down.",
    504: "The request took longer than the limit.",
}


def openapi_document(settings: Settings, version: str) -> dict[str, Any]:
    """The document, with the limits of these settings."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Qwen3-VL-Embedding",
            "version": version,
            "description": "Text and images in, one vector per item out.",
        },
        "paths": {
            "/txt/embed": _post("embedText", "Embed texts", TextRequest),
            "/img/embed": _post("embedImage", "Embed images", ImageRequest),
            "/embed_texts": _post_rows("embed_texts", "texts", "Texts, for BentoML clients (adaptive batching)"),
            "/embed_images": _post_rows("embed_images", "images", "Images, for BentoML clients (adaptive batching)"),
            "/health": _get("health", "200 once something was embedded for real", 503),
            "/info": _get("info", "Model, sizes, limits and device", None),
        },
        "components": {"schemas": _schemas(settings)},
    }


def _schemas(settings: Settings) -> dict[str, Any]:
    models: list[type[BaseModel]] = [TextRequest, ImageRequest]
    answers: list[type[BaseModel]] = [EmbeddingResponse, ErrorResponse]
    _, document = models_json_schema(
        [*((model, "validation") for model in models), *((model, "serialization") for model in answers)],
        by_alias=False,
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = document["$defs"]
    for model in models:
        for option in schemas[model.__name__]["properties"]["input"]["anyOf"]:
            if option["type"] == "array":
                option["maxItems"] = settings.max_items_per_request
    return schemas


def _post(operation: str, summary: str, model: type[BaseModel]) -> dict[str, Any]:
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": _json(_ref(model.__name__))},
            "responses": {"200": _answer("The vectors.", _ref("EmbeddingResponse")), **_errors()},
        }
    }


def _post_rows(operation: str, field: str, summary: str) -> dict[str, Any]:
    row = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    body = {"type": "object", "properties": {field: {"type": "array", "items": row}}, "required": [field]}
    vectors = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": _json(body)},
            "responses": {"200": _answer("One vector per row.", vectors), **_errors()},
        }
    }


def _get(operation: str, summary: str, unready: int | None) -> dict[str, Any]:
    responses = {"200": _answer(summary, {"type": "object"})}
    if unready:
        responses[str(unready)] = _answer("Not ready.", _ref("ErrorResponse"))
    return {"get": {"operationId": operation, "summary": summary, "responses": responses}}


def _errors() -> dict[str, Any]:
    return {str(status): _answer(text, _ref("ErrorResponse")) for status, text in ERRORS.items()}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": _json(schema)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
