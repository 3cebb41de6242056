"""Several workers on one device return the same vectors. `test_settings` checks which device each uses."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from embedder import Embedder
from tests.conftest import start_server

pytestmark = pytest.mark.slow


def test_two_replicas_serve_the_same_vectors(tmp_path: Path, embedder: Embedder) -> None:
    model = str(embedder.checkpoint.folder)
    server = start_server(tmp_path, model=model, device="cpu", workers="2", preprocess_threads="1")
    deadline = time.monotonic() + 60
    while server.log.read_text().count(" loaded in ") < 2 and time.monotonic() < deadline:  # one is enough to be ready
        time.sleep(0.1)
    assert server.log.read_text().count(" loaded in ") == 2
    expected = embedder.embed(["red"])[0]
    for _ in range(20):  # a connection each, so that both are met
        answer = httpx.post(f"{server.url}/txt/embed", json={"input": "red"}, timeout=60)
        np.testing.assert_allclose(answer.json()["embedding"], expected, atol=1e-6)
    assert server.stop() == 0
