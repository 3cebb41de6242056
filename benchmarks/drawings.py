"""The drawings of the demo collection and their names."""

from __future__ import annotations

import importlib.resources
import json
from functools import cache

import PIL.Image

_FOLDER = importlib.resources.files("embedder") / "demo"


@cache
def drawing_sheet() -> PIL.Image.Image:
    """The sheet with all drawings."""
    with (_FOLDER / "drawings.png").open("rb") as file:
        return PIL.Image.open(file).convert("RGB")


@cache
def drawings_of_the_demo() -> tuple[list[str], list[PIL.Image.Image]]:
    """Names and images, in the same order."""
    about = json.loads((_FOLDER / "drawings.json").read_text(encoding="utf-8"))
    side, columns = about["tile_pixels"], about["columns"]
    names = [drawing["name"] for drawing in about["drawings"]]
    corners = [(index % columns * side, index // columns * side) for index in range(len(names))]
    return names, [drawing_sheet().crop((x, y, x + side, y + side)) for x, y in corners]
