"""The rows of a collection -> the documents that a reranker judges, read from the input of the collection again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from embedder.bulk.pages import FolderPages, is_clip, read_inside
from embedder.errors import ITEM_ERRORS, EmbedderError, InvalidMedia
from embedder.inputs.items import EmbeddingItem, Video
from embedder.inputs.regimes import Regime
from embedder.search.collection import Collection, Hit
from embedder.search.records import Records, to_item
from embedder.settings import Settings


class Documents:
    """Reads rows in a thread of its own, and documents of a folder in a process of its own. Close it at the end.

    `regime`: the reranker's, which determines the size of a document's pages. Raises `ValueError` if the output does
    not say what it was made of.
    """

    def __init__(self, collection: Collection, settings: Settings, regime: Regime) -> None:
        if collection.folder is None or collection.input is None:
            raise ValueError(
                "the output does not say from which input it was made, which reranking needs; an older version wrote it"
            )
        self._records = Records(collection, settings)
        self._settings = settings
        self._regime = regime
        self._folder = collection.folder.resolve()
        self._pages = FolderPages(self._folder, settings, collection.state)
        self._thread = ThreadPoolExecutor(1, "documents")  # the pages' process ends with the thread that has started it

    def read(self, hits: Sequence[Hit]) -> list[EmbeddingItem | EmbedderError]:
        """The document of each row, or why it cannot be read anymore."""
        return self._thread.submit(self._read, hits).result()

    def close(self) -> None:
        """End the thread and the processes."""
        self._thread.submit(self._pages.close).result()
        self._thread.shutdown()

    def _read(self, hits: Sequence[Hit]) -> list[EmbeddingItem | EmbedderError]:
        return self._records.read(hits) if self._records.exist else self._of_folder(hits)

    def _of_folder(self, hits: Sequence[Hit]) -> list[EmbeddingItem | EmbedderError]:
        found: list[EmbeddingItem | EmbedderError] = []
        for hit in hits:
            try:
                found.append(to_item(self._file(hit)))
            except ITEM_ERRORS as error:
                found.append(error)
            except OSError as error:  # the file has been removed in between
                found.append(InvalidMedia(f"the input cannot be read: {error}"))
        return found

    def _file(self, hit: Hit) -> Mapping[str, Any]:
        """A page, picture, clip or segment. Raises `InvalidMedia` and `MediaTooLarge`."""
        if hit.page:
            return {"image": self._pages.render(hit.file, hit.page, self._regime, with_text=False).image}
        if is_clip(hit.file):
            return {"video": Video(self._pages.clip(hit.file), segment=hit.segment)}
        return {"image": read_inside(self._folder, hit.file, self._settings.max_image_bytes)}
