"""The models of request and response bodies -> the OpenAPI document of the service.

BentoML's generator is not used: it shows only the first member of a union, but clients read from the schema of `input`
whether it may be a list, and how long (`anyOf` with `maxItems`). Items, parts and messages, which the parsers read one
by one, are described by hand; tests compare the description with the parsers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from embedder.errors import EmbedderError, ModelUnavailable, NotFound, error_classes
from embedder.http.accepted_fields import ACCEPTED
from embedder.http.dialects.dialect import Dialect, TokenRoute, by_path
from embedder.http.dialects.messages import PART_TYPES
from embedder.http.dialects.openai_models import ModelsResponse
from embedder.http.dialects.rerank import ScoringFields
from embedder.http.dialects.tokens import ROUTES as TOKEN_ROUTES
from embedder.http.error_forms import ErrorForm, error_form
from embedder.http.openapi_tags import tag_operations
from embedder.http.priority import PRIORITY, SCHEMA
from embedder.http.request_body import RequestBody
from embedder.http.response import ErrorResponse
from embedder.http.uploads import BYTES, FORM
from embedder.inputs.items import EXAMPLE_IMAGE
from embedder.settings import Settings

ROUTING_STATUSES = (404, 405)  # of a wrong path, method or id: routes without an id do not have them

KEYS = {  # the ways to send an API key, if the service needs one
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

JSON = "application/json"
_FILE = {"type": "string", "format": "binary"}
_OBJECT = {"type": "object"}
_IDENTIFIER = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}

ROW_EXAMPLES: dict[str, dict[str, Any]] = {  # bodies of BentoML's APIs, each answered with 200
    "/embed_texts": {"texts": {"texts": ["red", {"text": "green", "dimensions": 64}]}},
    "/embed_images": {"images": {"images": [EXAMPLE_IMAGE, {"image": EXAMPLE_IMAGE, "instruction": "Find it."}]}},
}
RANKING_PATH = "/rerank_queries"
RANKING_EXAMPLES = {"queries": {"queries": [{"query": "red", "documents": ["red", "blue"]}]}}


def error_meanings() -> dict[int, str]:
    """What each error status of an embedding route means, from the errors themselves."""
    meanings: dict[int, list[str]] = {}
    for kind in error_classes(EmbedderError):
        if kind is not ModelUnavailable and kind.status not in ROUTING_STATUSES:
            meanings.setdefault(kind.status, []).append(f"`{kind.code}`: {kind.__doc__}")
    return {status: " ".join(meanings[status]) for status in sorted(meanings)}


def openapi_document(
    dialects: Sequence[Dialect[Any]], settings: Settings, version: str, *, needs_key: bool = False
) -> dict[str, Any]:
    """The document, with the limits of these settings."""
    paths = {
        **{path: _post(routes) for path, routes in by_path(dialects).items()},
        **{route.path: _post([route]) for route in TOKEN_ROUTES},
        "/v1/models": _get("/v1/models", "The served model, in the format of OpenAI's clients", _ref("ModelsResponse")),
        "/v1/models/{id}": _get(
            "/v1/models/{id}", "A served model, in the format of OpenAI's clients", _ref("ModelCard")
        ),
        "/embed_texts": _post_rows(
            "/embed_texts", "text", "Embed texts, for BentoML's clients (adaptive batching)", settings
        ),
        "/embed_images": _post_rows(
            "/embed_images", "image", "Embed images, for BentoML's clients (adaptive batching)", settings
        ),
        **({RANKING_PATH: _post_queries(settings)} if settings.reranker else {}),
        **(_batch_paths() if settings.batch_folder else {}),
        "/health": _probe("/health", "200 once the service has embedded a text and an image"),
        "/info": _get("/info", "Model, sizes, limits and device", {"type": "object"}),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Qwen3-VL-Embedding",
            "version": version,
            "description": "Embeds text, images, videos and mixtures of them: one vector per item.",
        },
        "tags": tag_operations(paths),
        "paths": paths,
        "components": {"schemas": _schemas(dialects, settings), "securitySchemes": KEYS},
        "security": [{name: []} for name in KEYS] if needs_key else [{}],
    }


def _schemas(dialects: Sequence[Dialect[Any]], settings: Settings) -> dict[str, Any]:
    routes: list[Dialect[Any] | TokenRoute] = [*dialects, *TOKEN_ROUTES]
    uploads = [one.upload.request for one in dialects if one.upload]
    requests: list[type[BaseModel]] = list(dict.fromkeys([*(route.request for route in routes), *uploads]))
    forms: list[type[BaseModel]] = [ErrorResponse, *(form.schema for route in routes for form in _error_forms([route]))]
    responses: list[type[BaseModel]] = [*(route.response for route in routes), ModelsResponse, *forms]
    _, document = models_json_schema(
        [
            *((model, "validation") for model in requests),
            *((model, "serialization") for model in dict.fromkeys(responses)),
        ],
        by_alias=False,
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = {**document["$defs"], **_items()}
    fields = {model.__name__: schemas[model.__name__]["properties"] for model in requests}
    for upload in (one.upload for one in dialects if one.upload):
        fields[upload.request.__name__][upload.name]["items"] = _FILE
    fields["EmbedRequest"]["items"]["items"] = {"anyOf": [{"type": "string"}, _ref("NamedItem")]}
    for model in ("EmbeddingsRequest", "PoolingRequest"):
        kind = {name: fields[model]["truncate"].pop(name) for name in ("enum", "type")}
        fields[model]["truncate"]["anyOf"] = [kind, {"type": "boolean"}]  # as Jina has it
        fields[model]["output_dtype"]["enum"] = [*fields[model]["output_dtype"]["enum"], "float"]  # as Voyage has it
    for model in ("CohereEmbedRequest", "CohereV1Request"):
        fields[model]["inputs"]["anyOf"][0]["items"] = _ref("Content")
    fields["VoyageRequest"]["inputs"]["items"] = _ref("Content")
    fields["PredictRequest"]["instances"]["items"] = {"anyOf": [{"type": "string"}, _ref("Item")]}
    entry = [{"type": "string"}, _ref("Input"), _ref("ChatPart")]
    conversation = _list_of(_ref("Message"))
    for model in ("EmbeddingsRequest", "PoolingRequest"):
        fields[model]["input"]["anyOf"] = [*entry, _list_of({"anyOf": entry}), {"type": "null"}]
        fields[model]["messages"]["anyOf"] = [conversation, _list_of(conversation), {"type": "null"}]
    for model, name in [
        ("TextRequest", "input"),
        ("ImageRequest", "input"),
        ("ImageForm", "image"),
        ("EmbedRequest", "items"),
        ("PredictRequest", "instances"),
        ("EmbeddingsRequest", "input"),
        ("CohereEmbedRequest", "texts"),
        ("CohereEmbedRequest", "images"),
        ("CohereEmbedRequest", "inputs"),
    ]:
        for option in [fields[model][name], *fields[model][name].get("anyOf", ())]:
            if option.get("type") == "array":
                option["maxItems"] = settings.max_items_per_request
    for name in (*(one.request.__name__ for one in dialects), *(one.__name__ for one in uploads)):
        schemas[name]["properties"][PRIORITY] = SCHEMA
    for request in requests:
        for name, clients in ACCEPTED.items():
            if "properties" in schemas[request.__name__]:
                schemas[request.__name__]["properties"].setdefault(name, {"description": f"No effect. {clients}."})
    for body in {*requests, *_subclasses(RequestBody)}:  # also those that are fields of others
        if body.__name__ in schemas:
            _allow_nulls(schemas[body.__name__])
    return schemas


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in model.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _allow_nulls(schema: dict[str, Any]) -> None:
    """Let every optional field of an object be null, which means the same as leaving it out."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()) or not {"type", "anyOf", "enum", "$ref"} & set(field):
            continue  # a field of any type takes null already
        about = {key: field[key] for key in ("description", "default", "title") if key in field}
        kinds = field.get("anyOf") or [{key: value for key, value in field.items() if key not in about}]
        if {"type": "null"} not in kinds and "null" not in kinds[0].get("type", ""):
            schema["properties"][name] = {"anyOf": [*kinds, {"type": "null"}], **about}


def _items() -> dict[str, Any]:
    """Items, parts and messages, which the parsers read one by one."""
    text = {"type": "string"}
    image = {"type": "string", "description": "Base64, bare or as a data URI; or a URL, if the service allows URLs."}
    frames = {"type": "array", "items": image, "description": "The frames, in order."}
    video = {"anyOf": [{"type": "string", "description": "An encoded video, given as for an image."}, frames]}
    fps = {"type": "number", "description": "Frames per second of a list, or the sampling rate of an encoded video."}
    kinds: dict[str, dict[str, Any]] = {"text": text, "image": image, "video": video}
    options = {
        "instruction": {"type": ["string", "null"], "description": "The task, as the system message."},
        "dimensions": {"type": ["integer", "null"], "minimum": 1, "description": "Matryoshka size."},
        "normalize": {"type": "boolean", "default": True},
        "truncate": {"enum": ["end", "start", "none"], "default": "end"},
    }
    several = {name: {"anyOf": [kind, _list_of(kind)]} for name, kind in kinds.items()}
    of_kinds = {**several, "fps": fps, **options}
    parts = [
        _object({"type": {"const": name}, name: kind, **({"fps": fps} if name == "video" else {})}, ["type", name])
        for name, kind in kinds.items()
    ]
    address = {
        "anyOf": [
            {"type": "string"},
            _object({"url": text, "detail": text}, ["url"]),
            _object({"data": text, "format": text}, ["data"]),
        ]
    }
    chat_kinds = {name: text if kind == "text" else {"anyOf": [address, video]} for name, kind in PART_TYPES.items()}
    chat_parts = {"type": {"enum": list(PART_TYPES)}, **chat_kinds, "fps": fps, "detail": text, "uuid": text}
    chat_content = {"anyOf": [text, _list_of(_ref("ChatPart"))]}
    any_content = [{"required": [name]} for name in (*kinds, "content")]
    name = {"type": ["string", "integer", "null"], "description": "Your name for the item; the response repeats it."}
    role = {"enum": ["system", "developer", "user", "assistant"]}
    content = {"anyOf": [_ref("Part"), _list_of(_ref("Part"))], "description": "Parts, in your order."}
    native = {**of_kinds, "content": content}
    schemas: dict[str, dict[str, Any]] = {
        "Part": {"title": "Part", "oneOf": parts},
        "Item": {"title": "Item", **_object(native, []), "anyOf": any_content},
        "NamedItem": {"title": "NamedItem", **_object({**native, "id": name}, []), "anyOf": any_content},
        "ChatPart": {"title": "ChatPart", **_object(chat_parts, ["type"])},
        "Input": {"title": "Input", **_object({**of_kinds, "content": chat_content}, []), "anyOf": any_content},
        "Content": {"title": "Content", **_object({"content": chat_content}, ["content"])},
        "Message": {
            "title": "Message",
            **_object({"role": role, "content": {"anyOf": [chat_content, {"type": "null"}]}, "name": text}, ["role"]),
        },
    }
    for schema in [*schemas.values(), *parts]:
        if "properties" in schema:
            _allow_nulls(schema)
    return schemas


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": schema}


def _post(routes: Sequence[Dialect[Any] | TokenRoute]) -> dict[str, Any]:
    """The operation of one path. Of several dialects, the body decides; the last one, the default, is first here."""
    path, routes = routes[0].path, routes[::-1]
    response = _response("The result.", _one_of([_ref(route.response.__name__) for route in routes]))
    body = _one_of([_ref(route.request.__name__) for route in routes])
    examples = {name: example for route in routes for name, example in route.examples.items()}
    errors = _one_of([_ref(form.schema.__name__) for form in _error_forms(routes)])
    operation = _operation(path, "; ".join(route.summary for route in routes), body, response, examples, errors)
    for upload in (route.upload for route in routes if isinstance(route, Dialect) and route.upload):
        form = {"schema": _ref(upload.request.__name__)}
        request = operation["post"]["requestBody"]
        request["content"] |= {FORM: form, BYTES: {"schema": _FILE}}
        request["description"] = (  # generators of clients refuse image/* as a key
            f"A body of type {BYTES} or image/* is an image; its options are in the query of the URL."
        )
        operation["post"]["parameters"] = _query_options(upload.request, upload.name)
    return operation


def _query_options(model: type[BaseModel], file: str) -> list[dict[str, Any]]:
    """The fields of a form except its files, as URL parameters. Without defaults: fields of a body take precedence."""
    parameters = []
    for name, schema in model.model_json_schema()["properties"].items():
        kinds = [one for one in schema.get("anyOf", [schema]) if one != {"type": "null"}]
        kept = {key: value for key, value in kinds[0].items() if key in ("type", "enum", "minimum")}
        if name != file:
            parameters.append({"name": name, "in": "query", "schema": kept, "description": schema["description"]})
    priority = {"schema": {"type": "integer"}, "description": SCHEMA["description"]}
    return [*parameters, {"name": PRIORITY, "in": "query", **priority}]


def _error_forms(routes: Sequence[Dialect[Any] | TokenRoute]) -> list[ErrorForm]:
    """How errors of a path may look: as the path has them, or as one of its dialects has them."""
    own = [route.errors for route in routes if isinstance(route, Dialect) and route.errors]
    return list(dict.fromkeys([error_form(routes[0].path), *own]))


def _one_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _post_rows(path: str, kind: str, summary: str, settings: Settings) -> dict[str, Any]:
    row = {"anyOf": [{"type": "string"}, _ref("Item")]}
    rows = {"type": "array", "items": row, "maxItems": settings.max_items_per_request}
    body = {"type": "object", "properties": {f"{kind}s": rows}, "required": [f"{kind}s"]}
    vectors = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    return _operation(
        path, summary, body, _response("One vector per row.", vectors), ROW_EXAMPLES[path], _ref("ErrorResponse")
    )


def _post_queries(settings: Settings) -> dict[str, Any]:
    row = ScoringFields.model_json_schema(by_alias=False)
    rows = {"type": "array", "items": row, "maxItems": settings.max_items_per_request}
    body = {"type": "object", "properties": {"queries": rows}, "required": ["queries"]}
    scores = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    summary = "Score the documents of queries, for BentoML's clients (adaptive batching)"
    response = _response("A list of scores per query, in the order of its documents.", scores)
    return _operation(RANKING_PATH, summary, body, response, RANKING_EXAMPLES, _ref("ErrorResponse"))


def _operation(
    path: str,
    summary: str,
    body: dict[str, Any],
    response: dict[str, Any],
    examples: Mapping[str, Any],
    error: dict[str, Any],
) -> dict[str, Any]:
    values = {name: {"value": value} for name, value in examples.items()}
    errors = {str(status): _response(text, error) for status, text in error_meanings().items()}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": "any"}
    return {
        "post": {
            "operationId": _operation_id(path),
            **({"parameters": [name]} if "{model}" in path else {}),
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": body, "examples": values}},
            },
            "responses": {"200": response, **errors},
        }
    }


def _probe(path: str, summary: str) -> dict[str, Any]:
    operation = _get(path, summary, {"type": "object"})["get"]
    del operation["responses"]["401"]
    return {"get": {**operation, "security": []}}


def _get(path: str, summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    meanings = error_meanings()
    refused = {str(status): _error(path, meanings[status]) for status in (401, 503)}
    operation: dict[str, Any] = {"operationId": _operation_id(path), "summary": summary}
    if "{id}" in path:
        refused["404"] = _error(path, f"`{NotFound.code}`: {NotFound.__doc__}")
        operation["parameters"] = [_IDENTIFIER]
    return {"get": {**operation, "responses": {"200": _response(summary, schema), **refused}}}


def _batch_paths() -> dict[str, Any]:
    """OpenAI's files and batches; their objects are described in docs/api/batches.md."""
    form = {"type": "object", "properties": {"purpose": {"const": "batch"}, "file": _FILE}}
    names = ("input_file_id", "endpoint", "completion_window")
    batch = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names[:2]}
    files, batches = "/v1/files", "/v1/batches"
    delete = _get(f"{files}/{{id}}", "Delete a file", _OBJECT)["get"]
    return {
        files: _get(files, "List files", _OBJECT) | _post_object(files, "Upload a file", FORM, form),
        f"{files}/{{id}}": _get(f"{files}/{{id}}", "Describe a file", _OBJECT)
        | {"delete": {**delete, "operationId": "delete_file"}},
        f"{files}/{{id}}/content": _get(f"{files}/{{id}}/content", "Download a file", {"type": "string"}),
        batches: _get(batches, "List batches", _OBJECT) | _post_object(batches, "Start a batch", JSON, batch),
        f"{batches}/{{id}}": _get(f"{batches}/{{id}}", "Describe a batch", _OBJECT),
        f"{batches}/{{id}}/cancel": _post_object(f"{batches}/{{id}}/cancel", "Stop a batch", JSON, None),
    }


def _post_object(path: str, summary: str, content_type: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    body = {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}} if schema else {}
    operation = _get(path, summary, _OBJECT)["get"]
    return {"post": {**operation, "operationId": f"post_{operation['operationId']}", **body}}


def _operation_id(path: str) -> str:
    """`/v1/embeddings` -> v1_embeddings: what a generated client calls it."""
    return re.sub(r"\W+", "_", path).strip("_") or "root"


def _error(path: str, text: str) -> dict[str, Any]:
    return _response(text, _ref(error_form(path).schema.__name__))


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
