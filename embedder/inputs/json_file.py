"""A text or JSON file of a checkpoint -> its content. Imports no numpy: the parent process reads config.json, too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from embedder.errors import ModelUnavailable


def read_text(path: Path) -> str | None:
    """The text of a file; None if there is none.

    Raises `ModelUnavailable` if it cannot be read, for example because it is a link to a file that is missing.
    """
    if not os.path.lexists(path):
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelUnavailable(f"cannot read {path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one if there is no file.

    Raises `ModelUnavailable` if it cannot be read, or is not an object.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ModelUnavailable(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} holds {type(content).__name__}; allowed: a JSON object")
    return content
