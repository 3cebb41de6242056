"""The inputs of published examples, read from a folder: `examples/` of the authors' repository, and a few pictures.

Nothing of their content is in this package. The repository keeps texts as pickles, which can run code when they are
loaded; here they may hold only lists, mappings, texts and numbers.
"""

from __future__ import annotations

import base64
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedder.errors import InvalidRequest
from embedder.verify.probes import Item

# What a damaged or foreign file makes `pickle` raise
_PICKLE_FAULTS = (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Entry:
    """A text in a file of the examples, at the keys and indices `place`."""

    file: str
    place: tuple[str | int, ...]


@dataclass(frozen=True)
class Input:
    """One published input. `text`: itself, or where it is. `image`: the name of a file."""

    text: str | Entry | None = None
    image: str | None = None
    instruction: str | None = None


class ExampleMissing(InvalidRequest):
    """An input that the folder does not have."""


class Examples:
    """The examples in `folder`; without one, only inputs that need no file are available.

    `image`: the bytes of demo.jpeg, if they are not in the folder.
    """

    def __init__(self, folder: Path | None, image: bytes | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise InvalidRequest(
                f"--examples: {folder} is not a folder; allowed: `examples/` of the authors' repository"
            )
        self.folder = folder
        self._image = image
        self._load = lru_cache(maxsize=None)(_load_pickle)

    def item(self, one: Input) -> Item:
        """The input as in the body of `POST /embed`. Raises `ExampleMissing`."""
        item: Item = {}
        if one.text is not None:
            item["text"] = self._text(one.text) if isinstance(one.text, Entry) else one.text
        if one.image is not None:
            item["image"] = base64.b64encode(self._picture(one.image)).decode()
        return item | ({"instruction": one.instruction} if one.instruction else {})

    def _picture(self, name: str) -> bytes:
        if name == "demo.jpeg" and self._image is not None:
            return self._image
        return self._path(name).read_bytes()

    def _text(self, entry: Entry) -> str:
        value = self._load(self._path(entry.file))
        for step in entry.place:
            try:
                value = value[step]
            except (IndexError, KeyError, TypeError) as error:
                raise ExampleMissing(f"{entry.file} has nothing at {list(entry.place)}") from error
        if not isinstance(value, str):
            raise ExampleMissing(f"{entry.file} has {type(value).__name__} at {list(entry.place)}; needed: a text")
        return value

    def _path(self, name: str) -> Path:
        if self.folder is None:
            raise ExampleMissing(f"needs --examples FOLDER with {name}")
        path = self.folder / name
        if not path.is_file():
            raise ExampleMissing(f"{path} does not exist")
        return path


class _PlainUnpickler(pickle.Unpickler):
    """Loads lists, mappings, texts and numbers only."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}; allowed: lists, mappings, texts and numbers")


def _load_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except _PICKLE_FAULTS as error:
        raise ExampleMissing(f"{path} is not a file of the examples: {error}") from error
