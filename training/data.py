"""Images and captions for training and evaluation, from the prepared data folder.

All random functions take a numpy Generator, so one seed determines the whole training. Images are uint8 RGB arrays
whose sides are multiples of 32, so they are not resized before patchification.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import XKCD_COLORS, to_rgb
from numpy.random import Generator
from PIL import Image, ImageDraw

from training.prepare import DRAWING_PIXELS

Picture = np.ndarray  # (height, width, 3) uint8
Size = tuple[int, int]  # height, width

COLOR_NAMES = tuple(name.removeprefix("xkcd:") for name in XKCD_COLORS)
COLORS = np.array([[round(255 * value) for value in to_rgb(name)] for name in XKCD_COLORS.values()], np.uint8)
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "stripe")
BACKGROUNDS = ((255, 255, 255), (0, 0, 0), (240, 240, 240), (32, 33, 36), (255, 250, 240), (230, 240, 255))


def read_captions(data: Path) -> list[dict[str, Any]]:
    captions: list[dict[str, Any]] = json.loads((data / "captions.json").read_text(encoding="utf-8"))
    return captions


@dataclass(frozen=True)
class Drawings:
    """All drawings of one style as premultiplied RGBa."""

    place: dict[int, int]  # caption row -> place in the arrays
    large: np.ndarray  # (num_drawings, 224, 224, 4) uint8
    small: np.ndarray  # (num_drawings, 112, 112, 4), for sizes where the large one would alias


def read_drawings(data: Path, style: str) -> Drawings:
    large = np.load(data / "drawings" / f"{style}.npy", mmap_mode="r")
    rows = np.load(data / "drawings" / f"{style}.rows.npy")
    small = np.stack([_halve(drawing) for drawing in large])
    return Drawings({int(row): place for place, row in enumerate(rows)}, large, small)


def _halve(large: np.ndarray) -> np.ndarray:
    wide = large.astype(np.uint16)
    total = wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def plain_picture(drawings: Drawings, row: int, size: Size) -> Picture:
    """The drawing centered on white, as large as fits, without augmentation (used for evaluation)."""
    side = min(size)
    drawing = Image.fromarray(np.asarray(drawings.large[drawings.place[row]]), "RGBa")
    drawing = drawing.resize((side, side), Image.Resampling.BICUBIC) if side != DRAWING_PIXELS else drawing
    layer = Image.new("RGBa", (size[1], size[0]))
    layer.paste(drawing, ((size[1] - side) // 2, (size[0] - side) // 2))
    return _on_background(layer, (255, 255, 255))


def drawing_for(drawings: Drawings, row: int, size: Size) -> Image.Image:
    """The drawing as premultiplied RGBa, at the resolution that suits `size`."""
    source = drawings.large if min(size) > DRAWING_PIXELS // 2 else drawings.small
    return Image.fromarray(np.asarray(source[drawings.place[row]]), "RGBa")


def mixed(one: Image.Image, other: Image.Image, random: Generator) -> Image.Image:
    """A drawing between two styles of the same emoji: a blend, or parts of each, sometimes warped or with few colors.

    No vendor draws like this, which is the point: what is learned must not depend on a vendor's style.
    """
    if random.random() < 0.5:
        drawing = Image.blend(one.convert("RGBa"), other.convert("RGBa"), random.random())
    else:
        mask = Image.fromarray(random.integers(0, 256, (3, 3), np.uint8)).resize(one.size, Image.Resampling.BICUBIC)
        mask = mask.point(lambda value: max(0, min(255, 4 * value - 384)))
        drawing = Image.composite(one, other, mask)
    if random.random() < 0.6:
        drawing = _warped(drawing, random)
    if random.random() < 0.25:
        few = drawing.convert("RGBA").quantize(int(random.integers(4, 17)), Image.Quantize.FASTOCTREE)
        drawing = few.convert("RGBA").convert("RGBa")
    return drawing


def _warped(drawing: Image.Image, random: Generator) -> Image.Image:
    """The drawing on a grid of 3x3 cells whose inner corners are moved by up to a seventh of a cell."""
    side = drawing.width
    places = np.linspace(0, side, 4)
    corners = np.stack(np.meshgrid(places, places, indexing="ij"), -1)  # (4, 4, 2), rows and columns
    moved = corners.copy()
    moved[1:3, 1:3] += random.uniform(-side / 21, side / 21, (2, 2, 2))
    mesh = []
    for row in range(3):
        for column in range(3):
            box = (*corners[row, column, ::-1], *corners[row + 1, column + 1, ::-1])
            quad = [moved[row + y, column + x, ::-1] for y, x in ((0, 0), (1, 0), (1, 1), (0, 1))]
            mesh.append((tuple(round(float(value)) for value in box), tuple(np.concatenate(quad).tolist())))
    return drawing.transform(drawing.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def varied_frames(
    drawing: Image.Image, size: Size, random: Generator, strength: float, num_frames: int, is_mirrored: bool
) -> list[Picture]:
    """The drawing with random rotation, scale, shift, colors and background, and sometimes JPEG compression.

    The frames of a clip share these parameters; the drawing moves a little from frame to frame.
    """
    height, width = size
    scale = min(size) / drawing.width * random.uniform(1 - 0.28 * strength, 1 + 0.08 * strength)
    stretch = math.exp(random.normal(0, 0.06 * strength))
    angle = math.radians(random.normal(0, 7 * strength))
    free = [abs(side - scale * drawing.width) / 2 * 0.8 for side in (width, height)]
    shift = [random.uniform(-1, 1) * margin for margin in free]
    pace = [random.normal(0, 0.03) * side for side in (width, height)] if num_frames > 1 else [0.0, 0.0]
    background = _background(random) if random.random() < strength else (255, 255, 255)
    table = _recoloring(random) if random.random() < 0.7 * strength else None
    quality = int(random.integers(35, 95)) if random.random() < 0.1 * strength else None
    frames = []
    for frame in range(num_frames):
        center = [
            side / 2 + moved + frame * step for side, moved, step in zip((width, height), shift, pace, strict=True)
        ]
        affine = _placement(drawing.width / 2, center, scale, stretch, angle, is_mirrored)
        layer = drawing.transform((width, height), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        picture = _on_background(layer, background)
        if table is not None:
            picture = np.stack([table[picture[..., channel], channel] for channel in range(3)], axis=-1)
        frames.append(picture if quality is None else _through_jpeg(picture, quality))
    return frames


def _placement(
    half: float, center: list[float], scale: float, stretch: float, angle: float, is_mirrored: bool
) -> tuple[float, ...]:
    """PIL's affine transform from image to drawing coordinates that puts the drawing's center at `center`."""
    across, down = (-1 if is_mirrored else 1) / (scale * stretch), stretch / scale
    turn = (math.cos(angle) * across, math.sin(angle) * across, -math.sin(angle) * down, math.cos(angle) * down)
    offset_x = half - turn[0] * center[0] - turn[1] * center[1]
    offset_y = half - turn[2] * center[0] - turn[3] * center[1]
    return (turn[0], turn[1], offset_x, turn[2], turn[3], offset_y)


def _on_background(layer: Image.Image, background: tuple[int, ...]) -> Picture:
    pixels = np.asarray(layer).astype(np.uint16)
    clear = 255 - pixels[..., 3:]
    mixed = pixels[..., :3] + (clear * np.array(background, np.uint16) + 127) // 255
    return np.minimum(mixed, 255).astype(np.uint8)


def _background(random: Generator) -> tuple[int, ...]:
    chance = random.random()
    if chance < 0.55:
        return (255, 255, 255)
    if chance < 0.8:
        return BACKGROUNDS[random.integers(len(BACKGROUNDS))]
    return tuple(int(value) for value in random.integers(0, 256, 3))


def _recoloring(random: Generator) -> np.ndarray:
    """A (256, 3) lookup table with a gain and an offset per channel: brightness, contrast and a slight color cast."""
    gain = random.normal(1, 0.12) + random.normal(0, 0.05, 3)
    offset = random.normal(0, 12) + random.normal(0, 5, 3)
    return np.clip(np.arange(256)[:, None] * gain + offset, 0, 255).astype(np.uint8)


def _through_jpeg(picture: Picture, quality: int) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def swatch(color: int, size: Size) -> Picture:
    return np.broadcast_to(COLORS[color], (*size, 3))


def shape_picture(color: int, shape: str, size: Size, random: Generator) -> Picture:
    """One of SHAPES in a color on a plain background, at a random position."""
    height, width = size
    background = (255, 255, 255) if random.random() < 0.7 else BACKGROUNDS[random.integers(len(BACKGROUNDS))]
    image = Image.new("RGB", (width, height), background)
    draw, fill = ImageDraw.Draw(image), tuple(int(value) for value in COLORS[color])
    radius = min(size) * random.uniform(0.25, 0.48)
    x = width / 2 + random.uniform(-1, 1) * (width / 2 - radius)
    y = height / 2 + random.uniform(-1, 1) * (height / 2 - radius)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill)
    elif shape == "square":
        draw.rectangle(box, fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(2, int(radius / 3)))
    elif shape == "cross":
        draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill)
        draw.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill)
    elif shape == "stripe":
        draw.rectangle((0, y - radius / 3, width, y + radius / 3), fill)
    elif shape == "star":
        draw.polygon(_corners(x, y, [radius, radius * 0.4] * 5), fill)
    else:
        draw.polygon(_corners(x, y, [radius] * (3 if shape == "triangle" else 4)), fill)
    return np.asarray(image)


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Points around a center, starting at the top."""
    step = 2 * math.pi / len(radii)
    return [(x + r * math.sin(i * step), y - r * math.cos(i * step)) for i, r in enumerate(radii)]
