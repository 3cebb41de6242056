"""The bodies in which the clients of each route read errors. Status and code are the same in all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, Field

from embedder.errors import EmbedderError, Overloaded
from embedder.http.response import ErrorResponse, error_body, error_fields, to_json


@dataclass(frozen=True)
class ErrorForm:
    """`render` gives the body of an error response, which `schema` describes."""

    schema: type[BaseModel]
    render: Callable[[EmbedderError], bytes]


class OpenAIError(BaseModel):
    """An error in OpenAI's form; `code` is the same as on the other routes."""

    message: str
    type: str
    param: str | None = Field(description="The item that failed, such as `input[3]`.")
    code: str


class RepeatedMessage(BaseModel):
    """The message at the top of the body, where clients look for it that raise and retry by it."""

    detail: str = Field(description="The error's message, for clients of Voyage and Jina.")
    message: str = Field(description="The error's message, for clients of Cohere.")


class OpenAIErrorResponse(RepeatedMessage):
    """Body of a response with an error status, on the routes of OpenAI's and vLLM's clients."""

    error: OpenAIError


class CohereErrorResponse(RepeatedMessage, ErrorResponse):
    """Body of a response with an error status, on Cohere's routes."""


class PlainErrorResponse(BaseModel):
    """Body of error responses for the clients of TEI, Ollama and KServe."""

    error: str
    error_type: str = Field(description="The code of the error, as on the other routes.")


class DetailResponse(BaseModel):
    """Body of error responses for Voyage's clients."""

    detail: str
    code: str


class DashScopeErrorResponse(BaseModel):
    """Body of error responses for DashScope's clients."""

    code: str
    message: str


def openai_error_body(error: EmbedderError) -> bytes:
    """The error body that OpenAI's clients read."""
    kind = "rate_limit_error" if error.status == Overloaded.status else "server_error"
    if error.type == "invalid_request":
        kind = "invalid_request_error"
    param = None if error.item is None else f"input[{error.item}]"
    fields = {"message": str(error), "type": kind, "param": param, "code": error.code}
    return to_json({"error": fields, **_repeated(error)})


def _repeated(error: EmbedderError) -> dict[str, str]:
    return {"detail": str(error), "message": str(error)}


NATIVE = ErrorForm(ErrorResponse, error_body)
COHERE = ErrorForm(CohereErrorResponse, lambda error: to_json({**error_fields(error), **_repeated(error)}))
OPENAI = ErrorForm(OpenAIErrorResponse, openai_error_body)
PLAIN = ErrorForm(PlainErrorResponse, lambda error: to_json({"error": str(error), "error_type": error.code}))
VOYAGE = ErrorForm(DetailResponse, lambda error: to_json({"detail": str(error), "code": error.code}))
DASHSCOPE = ErrorForm(DashScopeErrorResponse, lambda error: to_json({"code": error.code, "message": str(error)}))

_BY_PREFIX = {  # the first that matches counts
    "/v1/multimodalembeddings": VOYAGE,
    "/v1/": OPENAI,
    **dict.fromkeys(("/v2/embed", "/v2/rerank"), COHERE),
    "/api/v1/services/": DASHSCOPE,
    "/api/": PLAIN,
    "/v2": PLAIN,
    "/similarity": PLAIN,
    "/decode": PLAIN,
    **dict.fromkeys(("/embeddings", "/pooling", "/invocations", "/tokenize", "/detokenize"), OPENAI),
}


def error_form(path: str) -> ErrorForm:
    """The form of a path's errors. A dialect that shares its path with others has a form of its own."""
    if path == "/":
        return PLAIN
    return next((form for prefix, form in _BY_PREFIX.items() if path.startswith(prefix)), NATIVE)
