"""The safetensors files of a checkpoint: which ones are read, and whether their shapes are those of config.json.

Reads only the headers, so that a mismatch is found before any memory is allocated for weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from embedder.errors import ModelUnavailable
from embedder.inputs.items import json_value
from embedder.inputs.json_file import read_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADS = frozenset({"lm_head.weight", "score.weight"})  # of the classes around the model; the trunk has no head
_PREFIX = "model."  # of the trunk's weights in the conditional-generation class

Shape = tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that are read, the same as by transformers: `model.safetensors`, else those of the index.

    Other files next to them, such as a consolidated copy of the same weights, are not read. Raises `ModelUnavailable`,
    with the name of the missing file.
    """
    if os.path.lexists(folder / SINGLE):
        return [folder / SINGLE]
    index = folder / INDEX
    if not os.path.lexists(index):
        found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "no .safetensors file"
        raise ModelUnavailable(
            f"cannot load {folder}: it has neither {SINGLE} nor {INDEX} (found: {found}); other formats are not read, "
            "because they can contain code"
        )
    try:
        names = sorted(set(json.loads(read_text(index) or "")["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{index}: weight_map is not an object of file names: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelUnavailable(
                f"{index}: weight_map names {json_value(name)}; allowed: .safetensors files of the folder"
            )
        if not (folder / name).is_file():
            raise ModelUnavailable(f"{index}: weight_map names {name!r}, but {folder} has no such file")
    return [folder / name for name in names]


def trunk_name(name: str) -> str:
    """The name of a weight without the prefix of the conditional-generation class."""
    return name.removeprefix(_PREFIX)


def read_shapes(folder: Path) -> dict[str, Shape]:
    """The shape of each weight in the files that are read. Raises `ModelUnavailable`."""
    shapes: dict[str, Shape] = {}
    for path in weight_files(folder):
        try:
            path.open("rb").close()  # safetensors calls a file that may not be read missing
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as error:
            raise ModelUnavailable(f"cannot read {path}: {error}") from error
    return shapes


def check_shapes(folder: Path, expected: Mapping[str, Shape]) -> list[str]:
    """Compare the files with the shapes that config.json describes; return the names of weights that are not used.

    `expected`: shapes by the trunk's names. The heads in `HEADS` are not reported. Raises `ModelUnavailable` if a
    weight is missing or has another shape.
    """
    found = {trunk_name(name): shape for name, shape in read_shapes(folder).items()}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - HEADS)
    if missing:
        others = f"; they have {len(unexpected)} other weights, e.g. {unexpected[0]}" if unexpected else ""
        raise ModelUnavailable(
            f"{folder}: the weights lack {len(missing)} of those that config.json describes, e.g. {missing[0]}{others}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelUnavailable(
                f"{folder}: {name} has the shape {list(found[name])}; config.json describes {list(shape)}. The two "
                "belong to different checkpoints"
            )
    return unexpected
