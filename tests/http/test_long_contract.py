"""As test_contract.py for every path, with the borders of each schema, undeclared methods and content types.

Schemathesis prepares the requests while pytest collects, for ten seconds, so conftest leaves this file out of runs
without slow tests.
"""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.openapi import from_dict

from tests.conftest import Server
from tests.http.test_contract import DOCUMENT, REFUSED, check

pytestmark = pytest.mark.slow

LONG = SchemathesisConfig.from_dict({"checks": REFUSED})


@from_dict(DOCUMENT, config=LONG).parametrize()
@hypothesis.settings(max_examples=100)
def test_responses_to_many_more_requests_match_the_document(case: schemathesis.Case, server: Server) -> None:
    check(case, server)
