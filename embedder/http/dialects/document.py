"""`POST /embed` with `document`: the pages of a PDF or TIFF file. `results` has a vector or an error for each page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from embedder.documents.limits import MAX_PAGES
from embedder.engine.postprocess import OutputDtype, check_output_dtype
from embedder.errors import InvalidRequest, RequestTooLarge
from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel
from embedder.http.dialects.embed import Failure, results_response
from embedder.http.request_body import EncodingFormat, Options, validate_body
from embedder.http.response import Usage, Vector
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, describe_value
from embedder.settings import Settings

_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", re.ASCII)
_MAX_CHARS = 10_000


class DocumentRequest(Options):
    """Body of `POST /embed` with a document. Its options apply to all pages."""

    document: str = Field(description="A PDF or TIFF file, in base64.")
    pages: str | None = Field(None, description="Such as `1-3,7`, counted from 1; default: all pages.")


class PageResult(BaseModel):
    """One page's vector, or its error."""

    index: int
    page: int = Field(description="Number of the page, from 1.")
    embedding: Vector | None = Field(None, description="Absent if the page failed.")
    error: Failure | None = Field(None, description="Absent if the page was embedded.")


class DocumentResponse(BaseModel):
    """Response of `POST /embed` to a document: one result for each page, in the order of `pages`."""

    results: list[PageResult]
    model: str
    usage: Usage


@dataclass(frozen=True)
class DocumentPagesRequest:
    """`document`: base64. `pages`: their numbers; empty for all. `options`: those of each page's item."""

    document: str
    pages: tuple[int, ...]
    options: Mapping[str, Any]
    encoding_format: EncodingFormat
    output_dtype: OutputDtype
    items: tuple[EmbeddingItem, ...] = ()  # they are made while the pages are rendered

    def item(self, image: Any) -> EmbeddingItem:
        """The item of a page."""
        return EmbeddingItem((Image(image),), **self.options)


def parse_document(body: Mapping[str, Any], settings: Settings) -> DocumentPagesRequest:
    """Body of `/embed` with a document -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    if not settings.max_document_pages:
        raise InvalidRequest(
            "document: this service takes no documents; the operator sets EMBEDDER_MAX_DOCUMENT_PAGES to allow them"
        )
    request = validate_body(DocumentRequest, body)
    pages = parse_pages(request.pages, settings.max_document_pages) if request.pages is not None else ()
    check_output_dtype(request.output_dtype, request.normalize)
    parsed = DocumentPagesRequest(
        request.document, pages, request.item_options(), request.encoding_format, request.output_dtype
    )
    parsed.item(EXAMPLE_IMAGE)  # raises what is wrong with the options
    return parsed


def parse_pages(pages: str, max_pages: int) -> tuple[int, ...]:
    """`1-3,7` -> 1, 2, 3, 7. Raises `InvalidRequest`, and `RequestTooLarge` for more than `max_pages`."""
    allowed = f"allowed: numbers and ranges from 1 to {MAX_PAGES}, such as 1-3,7"
    numbers: list[int] = []
    if len(pages) > _MAX_CHARS:
        raise InvalidRequest(f"pages: got {len(pages)} characters; {allowed}")
    for part in pages.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise InvalidRequest(f"pages: got {describe_value(pages)}; {allowed}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= MAX_PAGES:
            raise InvalidRequest(f"pages: got {describe_value(part.strip())}; {allowed}")
        check_page_count(len(numbers) + last - first + 1, max_pages)
        numbers += range(first, last + 1)
    return tuple(numbers)


def check_page_count(num_pages: int, max_pages: int) -> None:
    """Raises `RequestTooLarge` for more pages than `EMBEDDER_MAX_DOCUMENT_PAGES`."""
    if num_pages > max_pages:
        raise RequestTooLarge(
            f"{num_pages} or more pages; allowed: up to {max_pages} in one request (EMBEDDER_MAX_DOCUMENT_PAGES). "
            "Choose some of them with `pages`"
        )


def document_response(request: DocumentPagesRequest, outcomes: Outcomes, model: ServedModel) -> bytes:
    """Outcomes -> response body, as on `/embed` with items."""
    numbers = request.pages or range(1, len(outcomes) + 1)
    return results_response([{"page": number} for number in numbers], request, outcomes, model)


EMBED = Dialect(
    "/embed",
    "Embed the pages of a document: a vector or an error for each",
    DocumentRequest,
    DocumentResponse,
    parse_document,
    document_response,
    examples={},
    fails_per_item=True,
    given="document",
)
