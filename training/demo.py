"""Draw embedder/demo, the sprite sheet that the playground searches: `python -m training.demo`.

It contains only drawings of Noto Emoji (Apache-2.0), a trained style. drawings.json lists their names in the order of
the sheet, row by row.
"""

import argparse
import json
import re
from pathlib import Path

from PIL import Image

from training.data import plain_picture, read_captions, read_drawings
from training.prepare import DEFAULT_DATA

OUT = Path(__file__).parents[1] / "embedder" / "demo"
STYLE = "noto"
SMALLER_STYLES = {"fluent-emoji-flat", "noto-v1", "fxemoji"}  # drawings that these styles also have are common ones
TILE_PIXELS = 96
COLUMNS = 20
# Excluded: drawings that are not recognizable by themselves.
ABSTRACT = re.compile(
    "left|right|arrow|button|mark|sign|symbol|no |prohibited|speech|banknote|mailbox|-thirty|o'clock|:"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the demo collection.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    data: Path = parser.parse_args().data
    captions = read_captions(data)
    drawings = read_drawings(data, STYLE)
    shown = [
        row
        for row, caption in enumerate(captions)
        if caption["emoji"] >= "\U0001f300" and set(caption["icons"]) >= SMALLER_STYLES
        if not ABSTRACT.search(caption["name"])
    ]
    num_rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_PIXELS, num_rows * TILE_PIXELS), "white")
    for place, row in enumerate(shown):
        tile = Image.fromarray(plain_picture(drawings, row, (TILE_PIXELS, TILE_PIXELS)))
        sheet.paste(tile, (place % COLUMNS * TILE_PIXELS, place // COLUMNS * TILE_PIXELS))
    OUT.mkdir(parents=True, exist_ok=True)
    sheet.save(OUT / "drawings.png", optimize=True)
    description = {
        "sheet": "drawings.png",
        "tile_pixels": TILE_PIXELS,
        "columns": COLUMNS,
        "style": "Noto Emoji",
        "license": "Apache-2.0, copyright Google Inc.",
        "drawings": [{"name": captions[row]["name"], "emoji": captions[row]["emoji"]} for row in shown],
    }
    text = json.dumps(description, indent=1, ensure_ascii=False)
    (OUT / "drawings.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(shown)} drawings, {(OUT / 'drawings.png').stat().st_size / 1e6:.1f} MB, in {OUT}")


if __name__ == "__main__":
    main()
