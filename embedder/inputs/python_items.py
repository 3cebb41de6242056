"""Items as Python programs give them (texts, PIL images, arrays, paths, and mappings with those) -> EmbeddingItem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.errors import InvalidMedia, InvalidRequest
from embedder.inputs.formats import find_format
from embedder.inputs.items import EmbeddingItem, Image, Part, Text, Video, item_from_fields

PythonItem = str | Path | PIL.Image.Image | NDArray[np.uint8] | Mapping[str, Any] | EmbeddingItem


def is_single_item(items: object) -> bool:
    """True for one item where a list of items is expected. A string is one: its characters are not items."""
    if isinstance(items, np.ndarray):
        return items.ndim in (0, 2, 3)  # with one axis it is a list of texts, with four axes a list of images
    return isinstance(items, str | bytes | bytearray | Path | PIL.Image.Image | Mapping | EmbeddingItem)


def item_from_python(item: PythonItem, instruction: str | None, dimensions: int | None) -> EmbeddingItem:
    """`instruction` and `dimensions` apply unless the item has its own.

    A path is the file's content, whose first bytes tell images from videos. An array is an image: uint8, (height,
    width), (height, width, 3) or (height, width, 4). In a mapping, paths and arrays may be the values of `image` and
    `video`; an array with four axes is a list of frames. Raises `InvalidRequest` and its subclasses.
    """
    match item:
        case EmbeddingItem():
            return item
        case Mapping():
            fields = {name: _convert_media(value) for name, value in item.items()}
            return item_from_fields({"instruction": instruction, "dimensions": dimensions, **fields})
        case _:
            return EmbeddingItem((_to_part(item),), instruction, dimensions)


def _to_part(item: object) -> Part:
    match item:
        case str():
            return Text(item)
        case PIL.Image.Image():
            return Image(item)
        case np.ndarray():
            return Image(_image_from_array(item))
        case Path():
            data = _read(item)
            found = find_format(data)
            return Video(data) if found and found.ffmpeg and not found.pillow else Image(data)
    raise InvalidRequest(
        f"got {type(item).__name__}; allowed: a text, a path, a PIL image, an array, a mapping or an EmbeddingItem"
    )


def _convert_media(value: Any) -> Any:
    """The value with each path and array in it replaced by what `item_from_fields` takes."""
    match value:
        case Path():
            return _read(value)
        case np.ndarray():
            return [_image_from_array(frame) for frame in value] if value.ndim == 4 else _image_from_array(value)
        case Mapping():
            return {name: _convert_media(field) for name, field in value.items()}
        case list() | tuple():
            return [_convert_media(element) for element in value]
    return value


def _image_from_array(array: NDArray[Any]) -> PIL.Image.Image:
    is_gray_or_color = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_gray_or_color or not array.size:
        raise InvalidMedia(
            f"array of shape {array.shape} and type {array.dtype}; allowed: uint8 values from 0 to 255, in the shape "
            "(height, width), (height, width, 3) or (height, width, 4)"
        )
    return PIL.Image.fromarray(array)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidMedia(f"cannot read {path}: {error.strerror}") from error
