"""The rows of a collection that was made from Parquet, JSONL or tar files, read from these files again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import PIL.Image

from embedder.bulk.formats import FILE_ERRORS, Part
from embedder.bulk.plan import read_plan
from embedder.bulk.source import CONTENT, Columns, Source
from embedder.bulk.thumbnails import load_picture
from embedder.errors import ITEM_ERRORS, EmbedderError, InvalidMedia, NotFound
from embedder.inputs.items import EmbeddingItem, Image, Media, Text, Video, item_from_fields
from embedder.inputs.regimes import Regime
from embedder.search.collection import Collection, Hit
from embedder.settings import Settings


class Records:
    """What the rows were made of. Threads may share it.

    A collection of an older version, which does not say where its input is, and one of a folder of pictures, clips and
    documents have none.
    """

    def __init__(self, collection: Collection, settings: Settings) -> None:
        self._collection = collection
        self._settings = settings

    @cached_property
    def exist(self) -> bool:
        """Whether the rows are records. Those of a folder have names of files."""
        return self._collection.input is not None and any(part.path for part in self._parts.values())

    def read(self, hits: Sequence[Hit]) -> list[EmbeddingItem | EmbedderError]:
        """The content of each row, or why it cannot be read anymore.

        An instruction that it was embedded with is left out.
        """
        try:
            found = self._read(hits)
        except (ValueError, *FILE_ERRORS) as error:  # the input has been moved or changed
            found = [InvalidMedia(f"the input cannot be read: {error}") for _ in hits]
        return [to_item(one) for one in found]

    def picture(self, hit: Hit, regime: Regime) -> PIL.Image.Image:
        """A row's first image, or the first frame of its first video. Raises `InvalidMedia`, and `NotFound`."""
        (item,) = self.read([hit])
        if isinstance(item, EmbedderError):
            raise item
        images, videos = ([part for part in item.parts if isinstance(part, kind)] for kind in (Image, Video))
        if not images and not videos:
            raise NotFound("the row has no picture")
        return load_picture(_source([*images, *videos][0]), regime, self._settings)

    def _read(self, hits: Sequence[Hit]) -> list[Mapping[str, Any] | EmbedderError]:
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
        found = self._source.rows(self._parts[number], only=rows)
        return dict(zip(sorted(rows), (one.fields for one in islice(found, len(rows))), strict=False))

    @cached_property
    def _parts(self) -> dict[int, Part]:
        return {part.number: part for part in read_plan(self._collection.state).parts}

    @cached_property
    def _source(self) -> Source:
        assert self._collection.input is not None
        return Source(self._collection.input, Columns(**self._collection.columns), self._settings)


def text_of(item: EmbeddingItem) -> str:
    """The texts of an item, each on a line of its own."""
    return "\n".join(part.text for part in item.parts if isinstance(part, Text))


def has_picture(item: EmbeddingItem) -> bool:
    """Whether an item has an image or a video."""
    return not all(isinstance(part, Text) for part in item.parts)


def to_item(fields: Mapping[str, Any] | EmbedderError) -> EmbeddingItem | EmbedderError:
    """The content of a row as an item."""
    if isinstance(fields, EmbedderError):
        return fields
    try:
        return item_from_fields({name: value for name, value in fields.items() if name in CONTENT})
    except ITEM_ERRORS as error:
        return error


def _source(part: Image | Video) -> Media | Video:
    """What `load_picture` takes: of a list of frames the first one."""
    if isinstance(part, Video):
        return part.source[0] if isinstance(part.source, tuple) else part
    return part.source
