"""The body of infinity's route is that of `/v1/embeddings`, but for 0 dimensions."""

from __future__ import annotations

from typing import Any

import pytest

from embedder.errors import EmbedderError
from embedder.http.dialects import infinity, openai
from embedder.settings import Settings


@pytest.mark.parametrize(("name", "given", "dimensions"), [("dimensions", 0, None), ("dim", 0, None), ("dim", 64, 64)])
def test_zero_dimensions_are_all_of_them(name: str, given: Any, dimensions: int | None) -> None:
    (item,) = infinity.EMBED.parse({"input": "red", name: given}, Settings()).items
    assert item.dimensions == dimensions


@pytest.mark.parametrize("given", [-1, 0.0, False, "0"])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(EmbedderError, match="dimensions: got"):
        infinity.EMBED.parse({"input": "red", "dimensions": given}, Settings())


def test_zero_dimensions_stay_an_error_on_the_route_of_openai() -> None:
    with pytest.raises(EmbedderError, match="dimensions: got 0"):
        openai.EMBEDDINGS.parse({"input": "red", "dimensions": 0}, Settings())
