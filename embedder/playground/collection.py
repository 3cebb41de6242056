"""The files of the playground page, and the collection of images that it searches.

The images come from the folder `EMBEDDER_DEMO_FOLDER`, or, with the bundled model, from the drawings in the package.
After the service is ready, they are embedded a few at a time, in between the requests of clients. Clients name an image
by its index only, never by a path.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.engine.aio import embed_each
from embedder.engine.engine import Engine
from embedder.engine.postprocess import to_base64
from embedder.errors import (
    DeadlineExceeded,
    DeviceFailed,
    EmbedderError,
    InvalidMedia,
    NotFound,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
)
from embedder.inputs.formats import IMAGE_SUFFIXES
from embedder.inputs.items import EmbeddingItem, Image
from embedder.inputs.picture import decode_image, open_image
from embedder.settings import Settings

logger = logging.getLogger(__name__)

PAGE = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
    "favicon.svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
MAX_PICTURES = 1000  # the page loads all vectors: 22 MB of base64 with the 8B model
THUMBNAIL_PIXELS = 192  # the longer side

_PACKAGE = Path(str(importlib.resources.files("embedder")))
_DEMO = _PACKAGE / "demo"
_PIXELS_TOGETHER = 512 * 512  # about 250 tokens, so that requests of clients wait little
_TIMEOUT_S = 600.0  # requests of clients go first

Read = Callable[[], bytes | PIL.Image.Image]  # reads an image: the bytes of a file, or a drawing
Source = tuple[str, Read]  # with its name
Opened = tuple[PIL.Image.Image, bytes] | EmbedderError  # the image and its thumbnail


@dataclass(frozen=True)
class Picture:
    """One image of the collection. `thumbnail`: WebP. `vector`: (hidden_size,) float32, unit length.

    `read`: None if the service has no reranker.
    """

    name: str
    thumbnail: bytes
    vector: NDArray[np.float32]
    read: Read | None


class Collection:
    """The images that the page searches, embedded by `build`. Empty without a folder and without the bundled model, and
    without any embedding model.

    Raises `ValueError` if `EMBEDDER_DEMO_FOLDER` is not a folder.
    """

    def __init__(self, settings: Settings, *, is_bundled_model: bool) -> None:
        self.title, self.license, self.num_left_out = "", "", 0
        self._settings = settings
        self._sources: list[Source] = []
        if settings.has_embedder and settings.demo_folder:
            self._take_folder(Path(settings.demo_folder))
        elif settings.has_embedder and is_bundled_model:
            self._take_demo()
        self.num_pictures = len(self._sources)
        self.pictures: list[Picture] = []
        self.skipped: list[tuple[str, str]] = []

    @property
    def status(self) -> str:
        """`building M of N`, `ready`, or `none` if there is nothing to search."""
        num_done = len(self.pictures) + len(self.skipped)
        if num_done < self.num_pictures:
            return f"building {num_done} of {self.num_pictures}"
        return "ready" if self.num_pictures else "none"

    async def build(self, engine: Engine) -> None:
        """Embed every image. An image that fails is listed in `skipped` with the reason."""
        pixels_together = _PIXELS_TOGETHER
        while self._sources:
            opened = await asyncio.to_thread(_open_some, self._sources, pixels_together, self._settings)
            items = [entry if isinstance(entry, EmbedderError) else _item(entry[0]) for entry in opened]
            try:
                outcomes = await embed_each(engine, items, _TIMEOUT_S)
            except (ShuttingDown, DeviceFailed):
                return
            except Overloaded as error:
                pixels_together //= 2  # the queue limit may be smaller than this group
                await asyncio.sleep(error.retry_after_s)
                continue
            except RequestTooLarge:
                pixels_together //= 2
                continue
            except DeadlineExceeded:
                continue
            for (name, read), entry, outcome in zip(self._sources, opened, outcomes, strict=False):
                if isinstance(entry, EmbedderError) or isinstance(outcome, EmbedderError):
                    self._skip(name, str(outcome))
                else:
                    kept = read if self._settings.reranker else None
                    self.pictures.append(Picture(name, entry[1], outcome.vector, kept))
            del self._sources[: len(opened)]

    def fields(self) -> dict[str, Any]:
        """The body of `GET /playground/collection`. `pictures` stays empty until all are embedded."""
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
        """The WebP thumbnail of image `index`, or None if there is no such image."""
        return self.pictures[index].thumbnail if 0 <= index < len(self.pictures) else None

    def documents(self, indices: Sequence[int]) -> list[EmbeddingItem | EmbedderError]:
        """The images as documents for the reranker, or why they cannot be read anymore. Raises `NotFound`."""
        if not all(0 <= index < len(self.pictures) for index in indices):
            raise NotFound(f"the collection has no such images: got {indices}; allowed: 0 to {len(self.pictures) - 1}")
        return [_document(self.pictures[index]) for index in indices]

    def _skip(self, name: str, reason: str) -> None:
        logger.warning("the playground skips %s: %s", name, reason)
        self.skipped.append((name, reason))

    def _take_folder(self, folder: Path) -> None:
        """Use the image files in `folder`, sorted by name; subfolders are not read."""
        if not folder.is_dir():
            raise ValueError(f"EMBEDDER_DEMO_FOLDER={str(folder)!r} is not a folder")
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        self.title = folder.resolve().name
        self.num_left_out = max(0, len(paths) - MAX_PICTURES)
        self._sources = [(path.name, functools.partial(_read, path)) for path in paths[:MAX_PICTURES]]

    def _take_demo(self) -> None:
        """Use the drawings in the package, cut from one sheet."""
        sheet_of = json.loads((_DEMO / "drawings.json").read_text(encoding="utf-8"))
        self.title, self.license = sheet_of["style"], sheet_of["license"]
        side, columns = sheet_of["tile_pixels"], sheet_of["columns"]

        @functools.cache  # 13 MB; freed with the last source, unless a reranker needs the drawings again
        def sheet() -> PIL.Image.Image:
            with PIL.Image.open(_DEMO / sheet_of["sheet"]) as image:
                return image.convert("RGB")

        def cut(place: int) -> PIL.Image.Image:
            left, top = place % columns * side, place // columns * side
            return sheet().crop((left, top, left + side, top + side))

        drawings = enumerate(sheet_of["drawings"])
        self._sources = [(drawing["name"], functools.partial(cut, place)) for place, drawing in drawings]


def page_file(name: str) -> tuple[bytes, str] | None:
    """The content and the content type of a file of the page, or None if the page has no such file."""
    if name not in PAGE:
        return None
    return (_PACKAGE / "playground" / name).read_bytes(), PAGE[name]


def _open_some(sources: list[Source], pixels_together: int, settings: Settings) -> list[Opened]:
    """Open the next images, up to about `pixels_together` pixels; an image that cannot be opened becomes its error."""
    opened: list[Opened] = []
    num_pixels = 0
    for _, read in sources:
        try:
            data = read()
            image = decode_image(open_image(data, settings)) if isinstance(data, bytes) else data
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


def _item(image: bytes | PIL.Image.Image) -> EmbeddingItem:
    return EmbeddingItem((Image(image),))


def _document(picture: Picture) -> EmbeddingItem | EmbedderError:
    assert picture.read is not None  # only a service with a reranker asks
    try:
        return _item(picture.read())
    except InvalidMedia as error:
        return error


def _read(path: Path) -> bytes:
    """The bytes of a file of the folder. Raises `InvalidMedia`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidMedia(f"the file cannot be read: {error.strerror}") from error
