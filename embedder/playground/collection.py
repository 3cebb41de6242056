"""The playground's page, and the pictures that it searches -> names, thumbnails and vectors, by the engine.

The pictures are those of the operator's folder, or the drawings that come with the small model. They are embedded a few
at a time beside the callers' requests, after the service is ready. A caller names a picture by its index alone.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.engine.aio import embed_each
from embedder.engine.engine import Engine
from embedder.errors import (
    DeadlineExceeded,
    DeviceFailed,
    EmbedderError,
    InvalidMedia,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
)
from embedder.http.response import to_base64
from embedder.inputs.image import decode_image, open_image
from embedder.inputs.items import EmbeddingItem, Image
from embedder.settings import Settings

logger = logging.getLogger(__name__)

PAGE = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
MAX_PICTURES = 1000  # the page holds all vectors: 22 MB of base64 for as many of the 8B's
THUMBNAIL_PIXELS = 192  # the longer side

_PACKAGE = Path(str(importlib.resources.files("embedder")))
_DEMO = _PACKAGE / "demo"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_PIXELS_TOGETHER = 512 * 512  # 250 tokens or so, that callers' requests may have to wait for, plus one picture
_PATIENCE_S = 600.0  # behind everything that callers ask

Source = tuple[str, Callable[[], PIL.Image.Image]]  # a picture's name, and how it is opened
Opened = tuple[PIL.Image.Image, bytes] | EmbedderError  # with its thumbnail


@dataclass(frozen=True)
class Picture:
    """One picture of the collection. `thumbnail`: WebP. `vector`: (hidden_size,) float32, unit length."""

    name: str
    thumbnail: bytes
    vector: NDArray[np.float32]


class Collection:
    """What the page searches. Grows while `build` runs; empty where there is nothing to search.

    Raises `ValueError` where the operator's folder is none.
    """

    def __init__(self, settings: Settings, *, is_bundled_model: bool) -> None:
        self.title, self.license, self.num_left_out = "", "", 0
        self._sources: list[Source] = []
        if settings.demo_folder:
            self._take_folder(Path(settings.demo_folder), settings)
        elif is_bundled_model:
            self._take_demo()
        self.num_pictures = len(self._sources)
        self.pictures: list[Picture] = []
        self.skipped: list[tuple[str, str]] = []

    @property
    def status(self) -> str:
        """Where building stands, in words."""
        num_done = len(self.pictures) + len(self.skipped)
        if num_done < self.num_pictures:
            return f"building {num_done} of {self.num_pictures}"
        return "ready" if self.num_pictures else "none"

    async def build(self, engine: Engine) -> None:
        """Embed every picture. One that cannot be is skipped, and named with the reason."""
        pixels_together = _PIXELS_TOGETHER
        while self._sources:
            opened = await asyncio.to_thread(_open_some, self._sources, pixels_together)
            items = [entry if isinstance(entry, EmbedderError) else _item(entry[0]) for entry in opened]
            try:
                outcomes = await embed_each(engine, items, _PATIENCE_S)
            except (ShuttingDown, DeviceFailed):
                return
            except Overloaded as error:
                pixels_together //= 2  # the queue may be too small for so many, even when it is empty
                await asyncio.sleep(error.retry_after_s)
                continue
            except RequestTooLarge:
                pixels_together //= 2
                continue
            except DeadlineExceeded:
                continue
            for (name, _), entry, outcome in zip(self._sources, opened, outcomes, strict=False):
                if isinstance(entry, EmbedderError) or isinstance(outcome, EmbedderError):
                    self._skip(name, str(outcome))
                else:
                    self.pictures.append(Picture(name, entry[1], outcome.vector))
            del self._sources[: len(opened)]

    def fields(self) -> dict[str, Any]:
        """For `/playground/collection`. Pictures come when all are there; until then `status` counts them."""
        status = self.status
        return {
            "status": status,
            "title": self.title,
            "license": self.license,
            "num_done": len(self.pictures) + len(self.skipped),
            "num_pictures": self.num_pictures,
            "num_left_out": self.num_left_out,
            "pictures": [
                {"name": picture.name, "thumbnail": f"thumbnails/{index}", "vector": to_base64(picture.vector)}
                for index, picture in enumerate(self.pictures if status == "ready" else ())
            ],
            "skipped": [{"name": name, "message": message} for name, message in self.skipped],
        }

    def thumbnail(self, index: int) -> bytes | None:
        """WebP, or None where there is no such picture."""
        return self.pictures[index].thumbnail if 0 <= index < len(self.pictures) else None

    def _skip(self, name: str, reason: str) -> None:
        logger.warning("the playground skips %s: %s", name, reason)
        self.skipped.append((name, reason))

    def _take_folder(self, folder: Path, settings: Settings) -> None:
        """The pictures directly in it, by name."""
        if not folder.is_dir():
            raise ValueError(f"EMBEDDER_DEMO_FOLDER={str(folder)!r} is not a folder")
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
        self.title = folder.resolve().name
        self.num_left_out = max(0, len(paths) - MAX_PICTURES)
        self._sources = [(path.name, functools.partial(_read, path, settings)) for path in paths[:MAX_PICTURES]]

    def _take_demo(self) -> None:
        """The drawings, cut out of their sheet."""
        sheet_of = json.loads((_DEMO / "drawings.json").read_text(encoding="utf-8"))
        self.title, self.license = sheet_of["style"], sheet_of["license"]
        side, columns = sheet_of["tile_pixels"], sheet_of["columns"]

        @functools.cache  # for as long as sources are left
        def sheet() -> PIL.Image.Image:
            with PIL.Image.open(_DEMO / sheet_of["sheet"]) as image:
                return image.convert("RGB")

        def cut(place: int) -> PIL.Image.Image:
            left, top = place % columns * side, place // columns * side
            return sheet().crop((left, top, left + side, top + side))

        drawings = enumerate(sheet_of["drawings"])
        self._sources = [(drawing["name"], functools.partial(cut, place)) for place, drawing in drawings]


def page_file(name: str) -> tuple[bytes, str] | None:
    """A file of the page and its content type, or None where the page has no such file."""
    if name not in PAGE:
        return None
    return (_PACKAGE / "playground" / name).read_bytes(), PAGE[name]


def _open_some(sources: list[Source], pixels_together: int) -> list[Opened]:
    """The next pictures with their thumbnails, or why not: small ones together, a large one ends the round."""
    opened: list[Opened] = []
    num_pixels = 0
    for _, opener in sources:
        try:
            image = opener()
        except EmbedderError as error:
            opened.append(error)
        else:
            opened.append((image, _thumbnail(image)))
            num_pixels += image.width * image.height
        if num_pixels >= pixels_together:
            break
    return opened


def _thumbnail(image: PIL.Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def _item(image: PIL.Image.Image) -> EmbeddingItem:
    return EmbeddingItem((Image(image),))


def _read(path: Path, settings: Settings) -> PIL.Image.Image:
    """An operator's file, under the limits of callers' images. Raises `InvalidMedia` and `MediaTooLarge`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidMedia(f"the file cannot be read: {error.strerror}") from error
    return decode_image(open_image(data, settings))
