"""The running service keeps its OpenAPI document, whatever the document allows or forbids to be sent.

Schemathesis makes the requests: the document's examples and random bodies, good and bad. The same ones in every run
(conftest's profile). `test_long_contract.py` makes many more.
"""

from __future__ import annotations

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.openapi import from_dict
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from embedder.http.openapi import openapi_document
from embedder.http.routes import DIALECTS
from embedder.settings import Settings
from tests.conftest import Server

REFUSED = {"negative_data_rejection": {"expected-statuses": ["400", "405", "413", "415"]}}
DOCUMENT = openapi_document(DIALECTS, Settings(), "0")
MAIN = ("/txt/embed", "/img/embed", "/embed", "/v1/embeddings", "/v2/embed", "/embed_texts", "/embed_images", "/info")
SHORT_DOCUMENT = {**DOCUMENT, "paths": {path: DOCUMENT["paths"][path] for path in MAIN}}
SHORT = SchemathesisConfig.from_dict({"checks": REFUSED, "phases": {"coverage": {"enabled": False}}})

# `positive_data_acceptance` is not among them: no schema tells base64 of a picture from other strings.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    allow_header_conformance,
]


def check(case: schemathesis.Case, server: Server) -> None:
    checks = list(CHECKS)
    # `/embed` responds with 200 as long as one item is good. On the other paths of TEI, what is wrong in one
    # format of the path may be right in another. Ollama's take a body without anything to embed. Unknown fields that
    # are null are ignored.
    if case.path in ("/embed", "/", "/invocations", "/api/embed", "/api/embeddings"):
        checks.remove(negative_data_rejection)
    if case.path == "/":  # the page for browsers at this path is not in the document
        checks.remove(allow_header_conformance)
        checks.remove(unsupported_method)
    case.call_and_validate(base_url=server.url, checks=checks, timeout=60)


@from_dict(SHORT_DOCUMENT, config=SHORT).parametrize()
@hypothesis.settings(max_examples=25)
def test_responses_match_the_document(case: schemathesis.Case, server: Server) -> None:
    check(case, server)
