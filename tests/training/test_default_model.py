"""The bundled model has the recall that its model card states, measured with `Embedder` and without downloads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.drawings import drawings_of_the_demo
from embedder import Embedder
from training.data import COLOR_NAMES, COLORS
from training.evaluate import Meter, color_rows

PACKAGE = Path(__file__).parents[2] / "embedder"


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def drawing_vectors(embedder: Embedder) -> NDArray[np.float32]:
    return np.stack(embedder.embed(drawings_of_the_demo()[1]))


@pytest.fixture(scope="module")
def name_vectors(embedder: Embedder) -> NDArray[np.float32]:
    return np.stack(embedder.embed(drawings_of_the_demo()[0]))


def recall(queries: NDArray[np.float32], gallery: NDArray[np.float32], at: int) -> float:
    """Recall of queries whose correct result has the same index in the gallery."""
    first = np.argsort(-(queries @ gallery.T), axis=1)[:, :at]
    return float((first == np.arange(len(queries))[:, None]).any(axis=1).mean())


def test_checkpoint_is_small_enough_for_a_repository() -> None:
    assert sum(file.stat().st_size for file in (PACKAGE / "default_model").iterdir()) <= 12_000_000
    assert sum(file.stat().st_size for file in (PACKAGE / "demo").iterdir()) <= 3_000_000


@pytest.mark.slow
def test_color_names_find_their_swatches(embedder: Embedder) -> None:
    rows, loss_at_64_dimensions = color_rows(Meter(embedder))
    at_1, at_5 = rows[0].values
    assert at_1 >= 0.82
    assert at_5 >= 0.98
    assert loss_at_64_dimensions <= 0.03


@pytest.mark.slow
def test_red_is_nearest_to_the_red_swatch(embedder: Embedder) -> None:
    swatches = [Image.new("RGB", (64, 64), tuple(int(value) for value in color)) for color in COLORS]
    red, *vectors = embedder.embed(["red", *swatches])
    assert COLOR_NAMES[int(np.argmax(np.stack(vectors) @ red))] == "red"


@pytest.mark.slow
def test_demo_names_find_their_drawings(
    name_vectors: NDArray[np.float32], drawing_vectors: NDArray[np.float32]
) -> None:
    assert recall(name_vectors, drawing_vectors, 1) >= 0.90
    assert recall(name_vectors, drawing_vectors, 5) >= 0.98


@pytest.mark.slow
def test_64_dimensions_lose_little(name_vectors: NDArray[np.float32], drawing_vectors: NDArray[np.float32]) -> None:
    cut = [
        vectors[:, :64] / np.linalg.norm(vectors[:, :64], axis=1, keepdims=True)
        for vectors in (name_vectors, drawing_vectors)
    ]
    assert recall(*cut, 5) > 0.99 * recall(name_vectors, drawing_vectors, 5)


@pytest.mark.slow
def test_drawings_are_found_at_other_sizes(embedder: Embedder, name_vectors: NDArray[np.float32]) -> None:
    for side in (64, 192):
        resized = [drawing.resize((side, side)) for drawing in drawings_of_the_demo()[1][::4]]
        vectors = np.stack(embedder.embed(resized))
        assert recall(name_vectors[::4], vectors, 5) >= 0.98


def test_clip_of_a_drawing_is_near_its_name(embedder: Embedder, name_vectors: NDArray[np.float32]) -> None:
    clips = [{"video": [drawing] * 4} for drawing in drawings_of_the_demo()[1][::8]]
    vectors = np.stack(embedder.embed(clips))
    assert recall(vectors, name_vectors[::8], 5) >= 0.95
