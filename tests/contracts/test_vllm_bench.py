"""vLLM's load generator, where it is installed: `PATH=FOLDER/bin:$PATH`, with the folder of its environment."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import Server
from tests.contracts.checks import VLLM
from tests.contracts.vllm_bench import BACKENDS, bench

pytestmark = pytest.mark.slow
NEEDS_VLLM = pytest.mark.skipif(not shutil.which(VLLM), reason=f"the command {VLLM} is not installed")


@NEEDS_VLLM
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "vllm-rerank"])
def test_every_request_of_an_embedding_backend_succeeds(backend: str, small_server: Server) -> None:
    bench(small_server.url, backend)


@NEEDS_VLLM
@pytest.mark.timeout(300)
def test_every_request_of_the_ranking_backend_succeeds(reranking_server: Server) -> None:
    bench(reranking_server.url, "vllm-rerank")
