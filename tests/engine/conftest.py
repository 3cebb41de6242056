"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

import embedder.inputs.pairs
import embedder.inputs.preprocess


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item is prepared in the engine's threads, as those with pictures are, however short its text is."""
    monkeypatch.setattr(embedder.inputs.preprocess, "SHORT_CHARS", -1)
    monkeypatch.setattr(embedder.inputs.pairs, "SHORT_CHARS", -1)
