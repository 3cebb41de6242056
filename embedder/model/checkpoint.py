"""Settings -> Checkpoint: the folder of the model they name, fetched from the hub where needed. No torch."""

from __future__ import annotations

import importlib.resources
import json
import os
from dataclasses import dataclass
from pathlib import Path

from embedder.errors import ModelUnavailable
from embedder.settings import Settings

BUNDLED = Path(str(importlib.resources.files("embedder") / "default_model"))
PUBLISHED = "Qwen/Qwen3-VL-Embedding-2B"
PUBLISHED_REVISION = "9f2f7e710d6d81056aa5c0a4f04764fec6bb7bda"

_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine. `name` is what the operator called it; `is_bundled`: the package's own."""

    folder: Path
    name: str
    revision: str
    is_bundled: bool


def find_checkpoint(settings: Settings) -> Checkpoint:
    """The folder the settings name, downloaded from the hub where it is a hub id.

    Where they name none: the small model shipped in the package, or, in a Bento, which is built without it, the
    published 2B. A model that was named is never replaced by another one.

    Raises `ModelUnavailable` saying what was looked for and what to do.
    """
    if not settings.model and BUNDLED.is_dir():
        return _checked(Checkpoint(BUNDLED, "bundled", "", is_bundled=True))
    if not settings.model:
        return _checked(_download(PUBLISHED, settings.revision or PUBLISHED_REVISION))
    if Path(settings.model).is_dir():
        return _checked(Checkpoint(Path(settings.model), settings.model, "", is_bundled=False))
    if settings.model.count("/") != 1 or settings.model.startswith((".", "/", "~")):
        raise ModelUnavailable(f"EMBEDDER_MODEL={settings.model!r} is neither a folder nor a hub id (owner/name)")
    return _checked(_download(settings.model, settings.revision))


def _download(name: str, revision: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        wanted = f"{name} at revision {revision}" if revision else name
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__  # "No space left on device"
        raise ModelUnavailable(
            f"model {wanted} is not in the local cache and could not be downloaded{offline}: {reason}. "
            "Make the hub reachable, or mount a checkpoint and set EMBEDDER_MODEL to its folder"
        ) from error
    return Checkpoint(folder, name, folder.name, is_bundled=False)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    config = checkpoint.folder / "config.json"
    if not config.is_file():
        raise ModelUnavailable(f"{checkpoint.folder} has no config.json: not a checkpoint")
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelUnavailable(f"{config} is not valid JSON: {error}") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type != "qwen3_vl":
        raise ModelUnavailable(f"{checkpoint.name} is a {model_type!r} model; only qwen3_vl can be served")
    return checkpoint
