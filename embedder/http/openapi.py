"""The wire models -> the OpenAPI document of the HTTP contract.

Written here because BentoML's generator shows only the first member of a union, and clients read from `input` whether
lists are accepted, and how long (`anyOf` with `maxItems`). What the wire models leave to later steps (items, parts,
messages: one that is wrong may not spoil the others) is described here by hand, and held to the parsers by tests.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from embedder.http.cohere import CohereEmbedRequest, CohereEmbedResponse
from embedder.http.embed import EmbedRequest, EmbedResponse
from embedder.http.local import EmbeddingResponse, ImageRequest, TextRequest
from embedder.http.messages import KINDS
from embedder.http.openai import EmbeddingsRequest, EmbeddingsResponse, ModelsResponse, OpenAIErrorResponse
from embedder.http.response import ErrorResponse
from embedder.inputs.items import EXAMPLE_IMAGE
from embedder.settings import Settings

ERRORS = {
    400: "The request says something that cannot be done; `message` names what was got and what is allowed.",
    401: "No API key came with the request, or none of the service's.",
    413: "The body, the number of items, or an image is over a limit.",
    415: "The body is not JSON.",
    424: "A URL could not be fetched: what `message` says is for its owner to mend.",
    429: "The queue is full; `Retry-After` says when to come back.",
    500: "The item could not be embedded; the service's log has the reason.",
    503: "The service is starting or shutting down.",
    504: "The request took longer than the limit.",
}

REQUESTS: tuple[type[BaseModel], ...] = (
    TextRequest,
    ImageRequest,
    EmbedRequest,
    EmbeddingsRequest,
    CohereEmbedRequest,
)
ANSWERS: tuple[type[BaseModel], ...] = (
    EmbeddingResponse,
    EmbedResponse,
    EmbeddingsResponse,
    ModelsResponse,
    CohereEmbedResponse,
    ErrorResponse,
    OpenAIErrorResponse,
)

KEYS = {  # the ways to send an API key, where the service has such
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

_DATA_URI = f"data:image/png;base64,{EXAMPLE_IMAGE}"
_QUERY = "Retrieve images or text relevant to the user's query."
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {  # bodies by route and name, each answered with 200
    "/txt/embed": {
        "one text": {"input": "red"},
        "several, smaller": {"input": ["red", "green"], "dimensions": 64, "encoding_format": "base64"},
    },
    "/img/embed": {"one image": {"input": EXAMPLE_IMAGE}, "several": {"input": [EXAMPLE_IMAGE, _DATA_URI]}},
    "/embed": {
        "text, image, mixture": {
            "items": [
                "red",
                {"text": "a red square", "instruction": _QUERY, "id": "query"},
                {"image": EXAMPLE_IMAGE, "dimensions": 64},
                {"content": [{"type": "text", "text": "a swatch: "}, {"type": "image", "image": EXAMPLE_IMAGE}]},
            ]
        },
        "one bad item": {"items": ["red", {"image": "not a picture"}]},
    },
    "/v1/embeddings": {
        "texts": {"input": ["red", "green"], "model": "any", "encoding_format": "float"},
        "image as data URI": {"input": _DATA_URI},
        "objects": {
            "input": [
                {"text": "red"},
                {"image": EXAMPLE_IMAGE},
                {"content": [{"type": "text", "text": "red"}, {"type": "image_url", "image_url": {"url": _DATA_URI}}]},
            ]
        },
        "messages": {
            "messages": [
                {"role": "system", "content": _QUERY},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": _DATA_URI}}]},
            ]
        },
    },
    "/v2/embed": {
        "texts": {"model": "any", "texts": ["red"], "input_type": "search_query"},
        "types": {"images": [_DATA_URI], "input_type": "image", "embedding_types": ["int8", "ubinary", "base64"]},
        "mixture": {
            "inputs": [
                {
                    "content": [
                        {"type": "text", "text": "a swatch"},
                        {"type": "image_url", "image_url": {"url": _DATA_URI}},
                    ]
                }
            ]
        },
    },
    "/embed_texts": {"texts": {"texts": ["red", {"text": "green", "dimensions": 64}]}},
    "/embed_images": {"images": {"images": [EXAMPLE_IMAGE, {"image": EXAMPLE_IMAGE, "instruction": "Find it."}]}},
}


def openapi_document(settings: Settings, version: str, *, needs_key: bool = False) -> dict[str, Any]:
    """The document, with the limits of these settings."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Qwen3-VL-Embedding",
            "version": version,
            "description": "Text, images, videos and mixtures of them in, one vector per item out.",
        },
        "paths": {
            "/txt/embed": _post("/txt/embed", "Embed texts", TextRequest, EmbeddingResponse),
            "/img/embed": _post("/img/embed", "Embed images", ImageRequest, EmbeddingResponse),
            "/embed": _post("/embed", "Embed items of any kind, each failing alone", EmbedRequest, EmbedResponse),
            "/v1/embeddings": _post("/v1/embeddings", "As OpenAI's clients ask", EmbeddingsRequest, EmbeddingsResponse),
            "/v1/models": _get("/v1/models", "The model, as OpenAI's clients ask", _ref("ModelsResponse")),
            "/v2/embed": _post("/v2/embed", "As Cohere's clients ask", CohereEmbedRequest, CohereEmbedResponse),
            "/embed_texts": _post_rows(
                "/embed_texts", "text", "Texts, for BentoML clients (adaptive batching)", settings
            ),
            "/embed_images": _post_rows(
                "/embed_images", "image", "Images, for BentoML clients (adaptive batching)", settings
            ),
            "/health": _probe("/health", "200 once something was embedded for real"),
            "/info": _get("/info", "Model, sizes, limits and device", {"type": "object"}),
        },
        "components": {"schemas": _schemas(settings), "securitySchemes": KEYS},
        "security": [{name: []} for name in KEYS] if needs_key else [{}],
    }


def _schemas(settings: Settings) -> dict[str, Any]:
    _, document = models_json_schema(
        [*((model, "validation") for model in REQUESTS), *((model, "serialization") for model in ANSWERS)],
        by_alias=False,
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = {**document["$defs"], **_items()}
    fields = {model.__name__: schemas[model.__name__]["properties"] for model in REQUESTS}
    fields["EmbedRequest"]["items"]["items"] = {"anyOf": [{"type": "string"}, _ref("NamedItem")]}
    fields["CohereEmbedRequest"]["inputs"]["anyOf"][0]["items"] = _ref("Content")
    entry = [{"type": "string"}, _ref("Input"), _ref("ChatPart")]
    conversation = _list_of(_ref("Message"))
    fields["EmbeddingsRequest"]["input"]["anyOf"] = [*entry, _list_of({"anyOf": entry}), {"type": "null"}]
    fields["EmbeddingsRequest"]["messages"]["anyOf"] = [conversation, _list_of(conversation), {"type": "null"}]
    for model, name in [
        ("TextRequest", "input"),
        ("ImageRequest", "input"),
        ("EmbedRequest", "items"),
        ("EmbeddingsRequest", "input"),
        ("CohereEmbedRequest", "texts"),
        ("CohereEmbedRequest", "images"),
        ("CohereEmbedRequest", "inputs"),
    ]:
        for option in [fields[model][name], *fields[model][name].get("anyOf", ())]:
            if option.get("type") == "array":
                option["maxItems"] = settings.max_items_per_request
    for request in REQUESTS:
        _allow_nulls(schemas[request.__name__])
    return schemas


def _allow_nulls(schema: dict[str, Any]) -> None:
    """Every field of an object that may be left out may also be null, which means the same."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()) or not {"type", "anyOf", "enum", "$ref"} & set(field):
            continue  # a field of any type takes null already
        about = {key: field[key] for key in ("description", "default", "title") if key in field}
        kinds = field.get("anyOf") or [{key: value for key, value in field.items() if key not in about}]
        if {"type": "null"} not in kinds and "null" not in kinds[0].get("type", ""):
            schema["properties"][name] = {"anyOf": [*kinds, {"type": "null"}], **about}


def _items() -> dict[str, Any]:
    """Items, parts and messages, which the parsers read one by one."""
    text, image = (
        {"type": "string"},
        {"type": "string", "description": "Base64, bare or as a data URI; or a URL, if on."},
    )
    frames = {"type": "array", "items": image, "description": "The frames, in order."}
    clip = {"anyOf": [{"type": "string", "description": "An encoded clip, likewise."}, frames]}
    fps = {"type": "number", "description": "Frames a second that the list has, or that are looked at of a clip."}
    kinds: dict[str, dict[str, Any]] = {"text": text, "image": image, "video": clip}
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
    chat_kinds = {name: text if kind == "text" else {"anyOf": [address, clip]} for name, kind in KINDS.items()}
    chat_parts = {"type": {"enum": list(KINDS)}, **chat_kinds, "fps": fps, "detail": text, "uuid": text}
    chat_content = {"anyOf": [text, _list_of(_ref("ChatPart"))]}
    something = [{"required": [name]} for name in (*kinds, "content")]
    name = {"type": ["string", "integer", "null"], "description": "Your own name for the item; the answer repeats it."}
    role = {"enum": ["system", "developer", "user", "assistant"]}
    content = {"anyOf": [_ref("Part"), _list_of(_ref("Part"))], "description": "Parts, in your order."}
    native = {**of_kinds, "content": content}
    schemas: dict[str, dict[str, Any]] = {
        "Part": {"title": "Part", "oneOf": parts},
        "Item": {"title": "Item", **_object(native, []), "anyOf": something},
        "NamedItem": {"title": "NamedItem", **_object({**native, "id": name}, []), "anyOf": something},
        "ChatPart": {"title": "ChatPart", **_object(chat_parts, ["type"])},
        "Input": {"title": "Input", **_object({**of_kinds, "content": chat_content}, []), "anyOf": something},
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


def _post(path: str, summary: str, request: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    return _operation(path, summary, _ref(request.__name__), _answer("The vectors.", _ref(answer.__name__)))


def _post_rows(path: str, kind: str, summary: str, settings: Settings) -> dict[str, Any]:
    row = {"anyOf": [{"type": "string"}, _ref("Item")]}
    rows = {"type": "array", "items": row, "maxItems": settings.max_items_per_request}
    body = {"type": "object", "properties": {f"{kind}s": rows}, "required": [f"{kind}s"]}
    vectors = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    return _operation(path, summary, body, _answer("One vector per row.", vectors))


def _operation(path: str, summary: str, body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    examples = {name: {"value": value} for name, value in EXAMPLES[path].items()}
    return {
        "post": {
            "operationId": _operation_id(path),
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": body, "examples": examples}},
            },
            "responses": {"200": answer, **{str(status): _error(path, text) for status, text in ERRORS.items()}},
        }
    }


def _probe(path: str, summary: str) -> dict[str, Any]:
    operation = _get(path, summary, {"type": "object"})["get"]
    del operation["responses"]["401"]
    return {"get": {**operation, "security": []}}


def _get(path: str, summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    refused = {str(status): _error(path, ERRORS[status]) for status in (401, 503)}
    responses = {"200": _answer(summary, schema), **refused}
    return {"get": {"operationId": _operation_id(path), "summary": summary, "responses": responses}}


def _operation_id(path: str) -> str:
    """`/v1/embeddings` -> v1_embeddings: what a generated client calls it."""
    return path.strip("/").replace("/", "_")


def _error(path: str, text: str) -> dict[str, Any]:
    return _answer(text, _ref("OpenAIErrorResponse" if path.startswith("/v1/") else "ErrorResponse"))


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
