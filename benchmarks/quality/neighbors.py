"""Check that a vector does not depend on the other items in its batch: random batches compared with single items."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.drawings import drawings_of_the_demo
from benchmarks.quality.color_data import NAMES, swatch
from embedder import Embedder

ALLOWED = 1e-6  # largest difference of a value in float32
MOST_ITEMS = 8  # per composition
NUM_OF_A_KIND = 16


def pool() -> list[dict[str, Any]]:
    """Texts of 1 to 61 color names, images of several sizes, and texts with images."""
    names, pictures = drawings_of_the_demo()
    texts = [" ".join(NAMES[index : index + 1 + 4 * index]) for index in range(NUM_OF_A_KIND)]
    sized: list[PIL.Image.Image] = [
        picture.resize((64 + 16 * (index % 5), 64 + 16 * (index % 3))) for index, picture in enumerate(pictures)
    ][:NUM_OF_A_KIND]
    mixed = [{"text": names[index], "image": swatch(index)} for index in range(NUM_OF_A_KIND)]
    return [*({"text": text} for text in texts), *({"image": picture} for picture in sized), *mixed]


class _Observed:
    """A forward pass that records the number of items in each batch."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self.sizes: list[int] = []

    def __call__(self, batch: Any) -> Any:
        states = self._forward(batch)
        self.sizes.append(len(states))
        return states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)


@contextmanager
def _in_place_of_forward(embedder: Embedder, observed: Any) -> Iterator[None]:
    model: Any = embedder.models.embedder
    forward, model.forward = model.forward, observed
    try:
        yield
    finally:
        model.forward = forward


def measure(embedder: Embedder, num_compositions: int, seed: int = 0) -> dict[str, Any]:
    """Compare random compositions with single items.

    A composition is one call of the library with 2 to 8 random items of the pool, with repetition. The engine decides
    which of them form a batch, as in a service; `mean_together` is the average batch size.
    """
    random = np.random.default_rng(seed)
    items = pool()
    alone = np.stack([embedder.embed([item])[0] for item in items])
    observed = _Observed(cast(Any, embedder.models.embedder).forward)
    largest = np.zeros(num_compositions)
    worst: dict[str, Any] = {}
    with _in_place_of_forward(embedder, observed):
        for number in tqdm(range(num_compositions), desc="compositions"):
            chosen = random.integers(0, len(items), random.integers(2, MOST_ITEMS + 1))
            together = np.stack(embedder.embed([items[index] for index in chosen]))
            differences = np.abs(together - alone[chosen]).max(axis=1)
            largest[number] = differences.max()
            if not worst or largest[number] > worst["difference"]:
                place = int(differences.argmax())
                worst = {"difference": float(largest[number]), "items": chosen.tolist(), "place": place}
                worst["number"] = number
    return {
        "num_compositions": num_compositions,
        "mean_together": float(np.mean(observed.sizes)),
        "most_together": max(observed.sizes),
        "worst": worst,
        "quantiles": _quantiles(largest),
        "is_within": worst["difference"] <= ALLOWED,
    }


def _quantiles(largest: NDArray[np.float64]) -> dict[str, float]:
    return {f"{share:g}": float(np.quantile(largest, share)) for share in (0.5, 0.9, 0.99, 0.999, 1.0)}


def text_of(found: dict[str, Any]) -> str:
    """The result as text."""
    worst = found["worst"]
    kinds = [("text", "image", "text with image")[index // NUM_OF_A_KIND] for index in worst["items"]]
    verdict = "within" if found["is_within"] else "NOT WITHIN"
    return (
        f"{found['num_compositions']} random compositions, float32; a batch had {found['mean_together']:.1f} items on "
        f"average and at most {found['most_together']}. Largest difference of any value from the single item: "
        f"{worst['difference']:.2e}, {verdict} {ALLOWED:g}. It occurred for item {worst['place']} of composition "
        f"{worst['number']} ({', '.join(kinds)}). Half of the compositions are below "
        f"{found['quantiles']['0.5']:.1e}, 99 % below {found['quantiles']['0.99']:.1e}."
    )
