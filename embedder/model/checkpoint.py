"""Settings to a checkpoint folder, downloaded from the hub if needed. Imports no torch."""

from __future__ import annotations

import importlib.resources
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedder.errors import ModelUnavailable
from embedder.inputs.items import json_value
from embedder.inputs.json_file import read_json, read_text
from embedder.settings import Settings

BUNDLED = Path(str(importlib.resources.files("embedder") / "default_model"))
BUNDLED_RERANKER = Path(str(importlib.resources.files("embedder") / "default_reranker"))
PUBLISHED = "Qwen/Qwen3-VL-Embedding-2B"
PUBLISHED_REVISION = "9f2f7e710d6d81056aa5c0a4f04764fec6bb7bda"

_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]


Role = Literal["embedder", "reranker"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder on this machine.

    `name` is the setting's value (folder or hub id), `revision` the downloaded commit; `is_bundled` marks the small
    models shipped in the package, named `bundled` and `bundled-reranker`.
    """

    folder: Path
    name: str
    revision: str
    is_bundled: bool


def find_checkpoint(settings: Settings) -> Checkpoint:
    """The folder that `settings.model` names, downloaded if it is a hub id.

    If it is empty or `bundled`: the small model shipped in the package. If it is empty in a Bento, which is built
    without the small model: the published 2B. It never falls back from a named model to another one.

    Raises `ModelUnavailable` if the model cannot be found or downloaded, is no Qwen3-VL checkpoint, or is a reranker.
    """
    if settings.model in ("", "bundled") and BUNDLED.is_dir():
        return _require_qwen3_vl(Checkpoint(BUNDLED, "bundled", "", is_bundled=True))
    if not settings.model:
        return _require_qwen3_vl(_download(PUBLISHED, settings.revision or PUBLISHED_REVISION, "EMBEDDER_MODEL"))
    checkpoint = _find(settings.model, settings.revision, "EMBEDDER_MODEL")
    if role_of(checkpoint) == "reranker":
        raise ModelUnavailable(
            f"EMBEDDER_MODEL={settings.model!r} is a reranker, which has no vectors; set EMBEDDER_RERANKER to it"
        )
    return checkpoint


def find_models(settings: Settings) -> list[Checkpoint]:
    """The checkpoints that `settings` name, the embedding model first. Raises `ModelUnavailable`."""
    found = [find_checkpoint(settings)] if settings.has_embedder else []
    return [*found, *([find_reranker(settings)] if settings.reranker else [])]


def find_reranker(settings: Settings) -> Checkpoint:
    """The folder that `settings.reranker` names, downloaded if it is a hub id; `bundled`: the one in the package.

    Raises `ModelUnavailable` if the model cannot be found or downloaded, is not a Qwen3-VL checkpoint, or is an
    embedding model.
    """
    if settings.reranker == "bundled" and BUNDLED_RERANKER.is_dir():
        return _require_qwen3_vl(Checkpoint(BUNDLED_RERANKER, "bundled-reranker", "", is_bundled=True))
    checkpoint = _find(settings.reranker, settings.reranker_revision, "EMBEDDER_RERANKER")
    if role_of(checkpoint) == "embedder":
        raise ModelUnavailable(
            f"EMBEDDER_RERANKER={settings.reranker!r} is an embedding model, whose scores would mean nothing; set "
            "EMBEDDER_MODEL to it, and EMBEDDER_RERANKER to a reranker such as Qwen/Qwen3-VL-Reranker-2B"
        )
    return checkpoint


def role_of(checkpoint: Checkpoint) -> Role | None:
    """What the checkpoint was trained for, by its files and then by its name; None if neither says.

    The architecture of both kinds is the same. Sentence Transformers' files tell them apart, and so do a head for
    classification and a chat template named `reranker`.
    """
    folder = checkpoint.folder
    if folder.resolve() == BUNDLED.resolve():
        return "embedder"
    if (folder / "additional_chat_templates" / "reranker.jinja").is_file():
        return "reranker"
    architectures = read_json(folder / "config.json").get("architectures") or ()
    if any("ForSequenceClassification" in name for name in architectures):
        return "reranker"
    modules = read_text(folder / "modules.json") or ""
    kind = str(read_json(folder / "config_sentence_transformers.json").get("model_type", ""))
    if "LogitScore" in modules or kind == "CrossEncoder":
        return "reranker"
    if "Pooling" in modules or kind == "SentenceTransformer":
        return "embedder"
    name = Path(checkpoint.name).name.lower()
    return "reranker" if "rerank" in name else "embedder" if "embed" in name else None


def _find(name: str, revision: str, variable: str) -> Checkpoint:
    """The checkpoint that the setting `variable` names. Raises `ModelUnavailable`."""
    if Path(name).is_dir():
        return _require_qwen3_vl(Checkpoint(Path(name), name, "", is_bundled=False))
    if name == "bundled":
        raise ModelUnavailable(
            f"{variable}='bundled': this installation has no such model, as in a Bento; allowed: a folder or a hub id"
        )
    if not _is_hub_id(name):
        raise ModelUnavailable(f"{variable}={name!r} is neither a folder nor a hub id (owner/name)")
    return _require_qwen3_vl(_download(name, revision, variable))


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def is_on_this_machine(name: str, revision: str) -> bool:
    """False if `name`, a value of `EMBEDDER_MODEL` or `EMBEDDER_RERANKER`, is a hub id that would be downloaded."""
    if name in ("", "bundled") and BUNDLED.is_dir():
        return True
    if name and (Path(name).is_dir() or not _is_hub_id(name)):
        return True  # or nothing is downloaded for it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = revision or (None if name else PUBLISHED_REVISION)
    try:
        snapshot_download(name or PUBLISHED, revision=wanted, allow_patterns=_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def _download(name: str, revision: str, variable: str) -> Checkpoint:
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
            f"Make the hub reachable, or mount a checkpoint and set {variable} to its folder"
        ) from error
    return Checkpoint(folder, name, folder.name, is_bundled=False)


def _require_qwen3_vl(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, after a look at its config.json."""
    config = checkpoint.folder / "config.json"
    if not config.is_file():
        raise ModelUnavailable(f"{checkpoint.folder} has no config.json: not a checkpoint")
    model_type = read_json(config).get("model_type")
    if model_type != "qwen3_vl":
        raise ModelUnavailable(
            f"{checkpoint.name} has model_type {json_value(model_type)}; only qwen3_vl can be served"
        )
    return checkpoint
