"""Settings to a checkpoint folder, downloaded from the hub if needed. Imports no torch."""

from __future__ import annotations

import importlib.resources
import json
import logging
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
    """A checkpoint folder on this machine.

    `name` is the setting's value (folder or hub id), `revision` the downloaded commit; `is_bundled` marks the small
    model shipped in the package.
    """

    folder: Path
    name: str
    revision: str
    is_bundled: bool


def find_checkpoint(settings: Settings) -> Checkpoint:
    """The folder that `settings.model` names, downloaded if it is a hub id.

    If it is empty: the small model shipped in the package, or the published 2B in a Bento, which is built without the
    small model. It never falls back from a named model to another one.

    Raises `ModelUnavailable` if the model cannot be found or downloaded, or is not a Qwen3-VL checkpoint.
    """
    if not settings.model and BUNDLED.is_dir():
        return _require_qwen3_vl(Checkpoint(BUNDLED, "bundled", "", is_bundled=True))
    if not settings.model:
        return _require_qwen3_vl(_download(PUBLISHED, settings.revision or PUBLISHED_REVISION))
    if Path(settings.model).is_dir():
        return _require_qwen3_vl(Checkpoint(Path(settings.model), settings.model, "", is_bundled=False))
    if settings.model.count("/") != 1 or settings.model.startswith((".", "/", "~")):
        raise ModelUnavailable(f"EMBEDDER_MODEL={settings.model!r} is neither a folder nor a hub id (owner/name)")
    return _require_qwen3_vl(_download(settings.model, settings.revision))


def _download(name: str, revision: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from embedder.model.progress import LoggedProgress

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns 22 times before it gives up
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=_FILES, tqdm_class=LoggedProgress)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        wanted = f"{name} at revision {revision}" if revision else name
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__  # "No space left on device"
        raise ModelUnavailable(
            f"model {wanted} is not in the local cache and could not be downloaded{offline}: {reason}. "
            "Make the hub reachable, or mount a checkpoint and set EMBEDDER_MODEL to its folder"
        ) from error
    return Checkpoint(folder, name, folder.name, is_bundled=False)


def _require_qwen3_vl(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, after a look at its config.json."""
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
