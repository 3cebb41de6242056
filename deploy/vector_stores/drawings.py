"""Write the drawings of the demo collection into a folder: `python deploy/vector_stores/drawings.py FOLDER`."""

import json
import pathlib
import sys

import PIL.Image

DEMO = pathlib.Path(__file__).parents[2] / "embedder" / "demo"


def write_drawings(folder: pathlib.Path, count: int | None = None) -> None:
    """Write one PNG per drawing, named after what it shows."""
    sheet_of = json.loads((DEMO / "drawings.json").read_text(encoding="utf-8"))
    side, columns = sheet_of["tile_pixels"], sheet_of["columns"]
    folder.mkdir(parents=True, exist_ok=True)
    with PIL.Image.open(DEMO / sheet_of["sheet"]) as sheet:
        for place, drawing in enumerate(sheet_of["drawings"][:count]):
            left, top = place % columns * side, place // columns * side
            sheet.crop((left, top, left + side, top + side)).save(folder / f"{drawing['name']}.png")


if __name__ == "__main__":
    write_drawings(pathlib.Path(sys.argv[1]))
