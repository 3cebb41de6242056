"""The rows of a collection -> the documents that a reranker judges, read from the input of the collection again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import Any

from embedder.bulk.formats import FILE_ERRORS, Part
from embedder.bulk.pages import FolderPages, is_clip, read_inside
from embedder.bulk.plan import read_plan
from embedder.bulk.source import CONTENT, Columns, Source
from embedder.errors import ITEM_ERRORS, EmbedderError, InvalidMedia
from embedder.inputs.items import EmbeddingItem, Video, item_from_fields
from embedder.inputs.regimes import Regime
from embedder.search.collection import Collection, Hit
from embedder.settings import Settings


class Documents:
    """Reads rows in a thread of its own, and documents of a folder in a process of its own. Close it at the end.

    `regime`: of the reranker, which gives the size of a document's pages. Raises `ValueError` if the output does not
    say what it was made of.
    """

    def __init__(self, collection: Collection, settings: Settings, regime: Regime) -> None:
        if collection.folder is None or collection.input is None:
            raise ValueError(
                "the output does not say what it was made of, as reranking needs; it is of an older version"
            )
        self._collection = collection
        self._settings = settings
        self._regime = regime
        self._folder = collection.folder.resolve()
        self._input = collection.input
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
        has_records = any(part.path for part in self._parts.values())  # those of a folder have names of files
        try:
            found = self._of_records(hits) if has_records else self._of_folder(hits)
        except (ValueError, *FILE_ERRORS) as error:  # the input has been moved or changed
            found = [InvalidMedia(f"the input cannot be read: {error}") for _ in hits]
        return [_item(one) for one in found]

    def _of_folder(self, hits: Sequence[Hit]) -> list[Mapping[str, Any] | EmbedderError]:
        found: list[Mapping[str, Any] | EmbedderError] = []
        for hit in hits:
            try:
                found.append(self._file(hit))
            except ITEM_ERRORS as error:
                found.append(error)
        return found

    def _file(self, hit: Hit) -> Mapping[str, Any]:
        """A page, picture, clip or segment. Raises `InvalidMedia` and `MediaTooLarge`."""
        if hit.page:
            return {"image": self._pages.render(hit.file, hit.page, self._regime).image}
        if is_clip(hit.file):
            return {"video": Video(self._pages.clip(hit.file), segment=hit.segment)}
        return {"image": read_inside(self._folder, hit.file, self._settings.max_image_bytes)}

    def _of_records(self, hits: Sequence[Hit]) -> list[Mapping[str, Any] | EmbedderError]:
        """Rows of Parquet, JSONL or tar files."""
        wanted: dict[int, set[int]] = defaultdict(set)  # by number of a part: rows in it
        places = [self._collection.part_of(hit.row) for hit in hits]
        for number, row in places:
            wanted[number].add(row)
        records = {
            (number, row): fields for number, rows in wanted.items() for row, fields in self._part(number, rows).items()
        }
        missing = InvalidMedia("the input has no such row anymore")
        return [records.get(place, missing) for place in places]

    def _part(self, number: int, rows: set[int]) -> dict[int, Mapping[str, Any] | EmbedderError]:
        if number not in self._parts:
            return {}
        found = self._source.rows(self._parts[number], self._regime, only=rows)
        return dict(zip(sorted(rows), (one.fields for one in islice(found, len(rows))), strict=False))

    @cached_property
    def _parts(self) -> dict[int, Part]:
        return {part.number: part for part in read_plan(self._collection.state).parts}

    @cached_property
    def _source(self) -> Source:
        return Source(self._input, Columns(**self._collection.columns), self._settings)


def _item(fields: Mapping[str, Any] | EmbedderError) -> EmbeddingItem | EmbedderError:
    """The content of a row. An instruction that it was embedded with does not matter to a reranker."""
    if isinstance(fields, EmbedderError):
        return fields
    try:
        return item_from_fields({name: value for name, value in fields.items() if name in CONTENT})
    except ITEM_ERRORS as error:
        return error
