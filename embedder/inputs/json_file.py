"""A JSON file of a checkpoint -> its fields. Imports no numpy: the parent process reads config.json, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedder.errors import ModelUnavailable


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one if there is no file. Raises `ModelUnavailable` if it is not an object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} holds {type(content).__name__}; allowed: a JSON object")
    return content
