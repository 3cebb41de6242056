"""Download and render the training data: `python -m training.prepare [--data FOLDER]`.

Downloads npm packages of emoji drawings and captions (needs `npm`), and writes one array of drawings per style and
captions.json. Existing files are kept.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

DEFAULT_DATA = Path.home() / ".cache" / "embedder-training"
DRAWING_PIXELS = 224  # side of a rendered drawing: the largest trained size
HELD_OUT_PERCENT = 15  # of the keywords
TRAINED_STYLES = (
    "noto",
    "fluent-emoji-flat",
    "fluent-emoji",
    "emojione",
    "noto-v1",
    "fxemoji",
    "streamline-emojis",
    "fluent-emoji-high-contrast",
)
HELD_OUT_STYLE = "twemoji"
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-emoji": "@iconify-json/fluent-emoji@1.2.7",
    "emojione": "@iconify-json/emojione@1.2.3",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "streamline-emojis": "@iconify-json/streamline-emojis@1.2.4",
    "fluent-emoji-high-contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "cldr": "cldr-annotations-full@48.2.0",
    "cldr-derived": "cldr-annotations-derived-full@48.2.0",
    "emojilib": "emojilib@4.0.3",
}
SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
WORDS = re.compile(r"[a-z0-9][a-z0-9 '&.,:!-]*")

Caption = dict[str, Any]  # emoji, name, keywords, late_keywords, held_out_keywords, icons: style -> icon name


def main() -> None:
    parser = argparse.ArgumentParser(description="Download and render the training data.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    data: Path = parser.parse_args().data
    for name, package in tqdm(PACKAGES.items(), desc="packages"):
        fetch_package(data / "npm", name, package)
    captions = read_captions(data / "npm")
    (data / "captions.json").write_text(json.dumps(captions, ensure_ascii=False, indent=1), encoding="utf-8")
    for style in (*TRAINED_STYLES, HELD_OUT_STYLE):
        render_style(data, style, captions)
    print(f"{len(captions)} drawings with captions in {data}")


def fetch_package(folder: Path, name: str, package: str) -> None:
    """Download with the npm client and unpack into `folder/name`."""
    target = folder / name
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    archive = folder / packed.stdout.strip()
    with tarfile.open(archive) as tar:
        tar.extractall(folder / f"{name}.partial", filter="data")
    shutil.move(folder / f"{name}.partial" / "package", target)
    archive.unlink()


def read_captions(npm: Path) -> list[Caption]:
    """The English name, the keywords and the icons of every emoji in Noto, without skin tones."""
    annotations = _annotations(npm)
    more_keywords = {_bare(emoji): words for emoji, words in _json(npm / "emojilib/dist/emoji-en-US.json").items()}
    with_code_points = ("noto", "fluent-emoji-flat", "fluent-emoji-high-contrast", "twemoji")
    icons = {style: _icons_by_emoji(npm, style, annotations) for style in with_code_points}
    shaded = _json(npm / "fluent-emoji" / "icons.json")["icons"]  # the same icons as the flat set, with shading
    icons["fluent-emoji"] = {emoji: icon for emoji, icon in icons["fluent-emoji-flat"].items() if icon in shaded}
    for style in ("emojione", "noto-v1", "fxemoji", "streamline-emojis"):
        icons[style] = _icons_by_slug(npm, style, icons["noto"], annotations)
    names = {emoji: annotations[emoji]["tts"][0] for emoji in icons["noto"]}
    known_names = {name.lower() for name in names.values()}
    captions = []
    for emoji in sorted(names):
        candidates = [*annotations[emoji].get("default", []), *more_keywords.get(emoji, [])]
        cleaned = {word.strip().lower().replace("_", " ").replace("’", "'") for word in candidates}
        keywords = sorted(word for word in cleaned if WORDS.fullmatch(word) and word != names[emoji].lower())
        held_out = [word for word in keywords if is_held_out(word) and word not in known_names]
        captions.append(
            {
                "emoji": emoji,
                "name": names[emoji].replace("’", "'"),
                "keywords": [word for word in keywords if word not in held_out],
                "late_keywords": [],
                "held_out_keywords": held_out,
                "icons": {style: table[emoji] for style, table in icons.items() if emoji in table},
            }
        )
    release_late_keywords(captions)
    return captions


def release_late_keywords(captions: list[Caption]) -> None:
    """Move half of the drawings of each held-out keyword (rounded down, chosen by hash) to its `late_keywords`."""
    for keyword in {word for caption in captions for word in caption["held_out_keywords"]}:
        having = [caption for caption in captions if keyword in caption["held_out_keywords"]]
        having.sort(key=lambda caption: _hash(caption["emoji"] + keyword))
        for caption in having[: len(having) // 2]:
            caption["held_out_keywords"].remove(keyword)
            caption["late_keywords"].append(keyword)
    for caption in captions:
        caption["late_keywords"].sort()


def is_held_out(keyword: str) -> bool:
    """Whether a keyword is among the held-out HELD_OUT_PERCENT. The hash makes it the same on every machine."""
    return _hash(keyword) % 100 < HELD_OUT_PERCENT


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def render_style(data: Path, style: str, captions: list[Caption]) -> None:
    """Write `drawings/{style}.npy`, (num_drawings, 224, 224, 4) uint8 premultiplied, and the rows of its captions."""
    target = data / "drawings" / f"{style}.npy"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    icon_set = _json(data / "npm" / style / "icons.json")
    rows = [row for row, caption in enumerate(captions) if style in caption["icons"]]
    drawings = np.zeros((len(rows), DRAWING_PIXELS, DRAWING_PIXELS, 4), np.uint8)
    for place, row in enumerate(tqdm(rows, desc=style)):
        drawings[place] = render(icon_set, captions[row]["icons"][style])
    np.save(target.with_name(f"{style}.rows.npy"), np.array(rows))
    np.save(target.with_suffix(".partial.npy"), drawings)
    target.with_suffix(".partial.npy").rename(target)


def render(icon_set: dict[str, Any], icon: str) -> np.ndarray:
    """Render one icon of an Iconify set: (224, 224, 4) uint8, RGB premultiplied with alpha, centered."""
    import resvg_py  # imported here, because tests and the evaluation of the colors do not need it

    icon = icon_set.get("aliases", {}).get(icon, {}).get("parent", icon)
    drawing = icon_set["icons"][icon]
    width = drawing.get("width", icon_set.get("width", 16))
    height = drawing.get("height", icon_set.get("height", 16))
    box = f"{drawing.get('left', 0)} {drawing.get('top', 0)} {width} {height}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="{box}" width="{width}" height="{height}">{drawing["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_PIXELS, height=DRAWING_PIXELS))
    image = Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa")
    canvas = Image.new("RGBa", (DRAWING_PIXELS, DRAWING_PIXELS))
    canvas.paste(image, ((DRAWING_PIXELS - image.width) // 2, (DRAWING_PIXELS - image.height) // 2))
    return np.asarray(canvas)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _bare(emoji: str) -> str:
    """Remove the variation selector, which the sources use inconsistently."""
    return emoji.replace("\ufe0f", "")


def _annotations(npm: Path) -> dict[str, dict[str, list[str]]]:
    plain = _json(npm / "cldr/annotations/en/annotations.json")["annotations"]["annotations"]
    derived = _json(npm / "cldr-derived/annotationsDerived/en/annotations.json")["annotationsDerived"]["annotations"]
    return {_bare(emoji): value for emoji, value in {**plain, **derived}.items() if not SKIN_TONE.search(emoji)}


def _icons_by_emoji(npm: Path, style: str, annotations: dict[str, Any]) -> dict[str, str]:
    """Icons by emoji, from the set's table of code points; only emoji with a CLDR name."""
    table = _json(npm / style / "chars.json")
    emoji_icons = {_bare("".join(chr(int(c, 16)) for c in code.split("-"))): icon for code, icon in table.items()}
    return {emoji: icon for emoji, icon in emoji_icons.items() if emoji in annotations}


def _icons_by_slug(npm: Path, style: str, noto: dict[str, str], annotations: dict[str, Any]) -> dict[str, str]:
    """Icons by emoji for sets without code points: match their names with those of Noto, CLDR and Unicode."""
    by_slug: dict[str, str] = {}
    for emoji, icon in noto.items():
        unicode_name = unicodedata.name(emoji, "") if len(emoji) == 1 else ""
        for name in (icon, annotations[emoji]["tts"][0], unicode_name):
            by_slug.setdefault(_slug(name), emoji)
    icon_set = _json(npm / style / "icons.json")
    found: dict[str, str] = {}
    for icon in (*icon_set["icons"], *icon_set.get("aliases", {})):
        emoji = by_slug.get(_slug(icon)) or by_slug.get(_slug(re.sub(r"-\d$", "", icon)))
        if emoji is not None:
            found.setdefault(emoji, icon)
    return found


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


if __name__ == "__main__":
    main()
