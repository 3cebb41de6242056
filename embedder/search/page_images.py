"""The pictures of a collection's rows as JPEG, made from the source files when they are requested.

The files are opened in processes that can be killed, as everywhere. If a file has changed or disappeared since it was
embedded, the error says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import PIL.Image

from embedder.bulk.formats import FOLDER
from embedder.bulk.pages import FolderPages, is_clip, path_inside, read_inside, split_page
from embedder.bulk.segments import split_segment
from embedder.bulk.thumbnails import load_picture, to_jpeg
from embedder.errors import InvalidMedia
from embedder.inputs.items import Video
from embedder.inputs.regimes import CheckpointRegime
from embedder.settings import Settings

PAGE_PIXELS = 2_000_000  # an A4 page in 144 dots per inch
CACHE_BYTES = 64 * 2**20

Load = Callable[[CheckpointRegime], PIL.Image.Image]


class PageImages:
    """Renders one row at a time, in a thread of its own. Close it at the end.

    `folder`: the input of the collection. `state`: its state folder, with the PDFs of office files.
    """

    def __init__(self, folder: Path, settings: Settings, state: Path | None = None) -> None:
        self._folder = folder.resolve()
        self._settings = settings
        self._pages = FolderPages(self._folder, settings, state)
        self._thread = ThreadPoolExecutor(1, "pages")  # the reader's process ends with the thread that has started it
        self._cache: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._num_bytes = 0

    def render(self, row_id: str, max_pixels: int) -> bytes:
        """The picture of a row (the first frame of a clip) as a JPEG of at most `max_pixels`.

        Raises `InvalidMedia` and `MediaTooLarge`.
        """
        return self._thread.submit(self._cached, row_id, max_pixels).result()

    def render_other(self, key: str, load: Load, max_pixels: int) -> bytes:
        """As `render`, of a row that was no file of the folder: `load` gives its picture, and `key` names it."""
        return self._thread.submit(self._cached, key, max_pixels, load).result()

    def source(self, row_id: str) -> Path:
        """The file that a row was made of. Raises `InvalidMedia`, also for a row that was no file of a folder."""
        name = split_page(row_id)[0]
        if PurePosixPath(name).suffix.lower() not in FOLDER.suffixes:
            raise InvalidMedia(f"row {row_id[:80]!r} was not made from a picture or document in a folder")
        return path_inside(self._folder, name)

    def close(self) -> None:
        """End the process and the thread."""
        self._thread.submit(self._pages.close).result()
        self._thread.shutdown()

    def _cached(self, row_id: str, max_pixels: int, load: Load | None = None) -> bytes:
        key = row_id, max_pixels
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        regime = CheckpointRegime(max_pixels=max_pixels)
        data = to_jpeg(load(regime) if load else self._image(row_id, regime))
        self._cache[key] = data
        self._num_bytes += len(data)
        while self._num_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._num_bytes -= len(self._cache.popitem(last=False)[1])
        return data

    def _image(self, row_id: str, regime: CheckpointRegime) -> PIL.Image.Image:
        self.source(row_id)
        file, page = split_page(row_id)
        if page:
            return self._pages.render(file, page, regime, with_text=False).image
        is_video = is_clip(file)
        limit = self._settings.max_video_bytes if is_video else self._settings.max_image_bytes
        data = read_inside(self._folder, file, limit)
        source = Video(data, segment=split_segment(row_id)[1]) if is_video else data
        return load_picture(source, regime, self._settings)
