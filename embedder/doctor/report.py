"""The checks of `python -m embedder.doctor`, and their report. They load no weights and download nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch

from embedder.errors import EmbedderError
from embedder.http.api_keys import ApiKeys
from embedder.http.batches.store import check_folder
from embedder.inputs.chat_template import check_chat_template
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model.attention import choose_attention
from embedder.model.checkpoint import Checkpoint, find_checkpoint, find_reranker, is_on_this_machine
from embedder.model.devices import check_device, choose_device, choose_dtype, unused_driver
from embedder.model.eight_bit import check_weight_format
from embedder.model.execution import choose_execution, find_compiler
from embedder.model.gpus import count_gpus
from embedder.model.memory import check_memory, free_bytes
from embedder.model.weights import check_vocabulary, check_weights
from embedder.playground.collection import Collection
from embedder.server.lifecycle import check_address
from embedder.settings import PREFIX, Settings, WeightFormat, available_cores

Value = TypeVar("Value")


@dataclass
class Report:
    """What was found so far: a name, and what the service would use or why it would not start."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)  # name, "ok" or "FAILED", text

    @property
    def num_faults(self) -> int:
        """Number of checks that failed."""
        return sum(verdict == "FAILED" for _, verdict, _ in self.rows)

    def add(self, name: str, find: Callable[[], Value], describe: Callable[[Value], str] = str) -> Value | None:
        """Add a row with what `find` returns, or with the error that it raises; then the result is None."""
        try:
            value = find()
            self.rows.append((name, "ok", describe(value)))
        except (EmbedderError, ValueError, OSError) as error:
            self.rows.append((name, "FAILED", str(error)))
            return None
        return value

    def __str__(self) -> str:
        lines = [f"{name:<12}{verdict:<8}{text}" for name, verdict, text in self.rows]
        failed = f"The service would not start: {self.num_faults} of {len(lines)} checks failed."
        return "\n".join([*lines, failed if self.num_faults else "The service would start."])


def examine(model: str, host: str, port: int) -> Report:
    """Check everything that a start needs, in the order of the service."""
    report = Report()
    settings = report.add("settings", Settings.from_environment, _describe_settings)
    report.add("port", lambda: check_address(host, port), lambda _: f"{port} is free")
    if settings is None:
        return report
    if model:
        settings = settings.model_copy(update={"model": model})
    report.add("API keys", lambda: ApiKeys(settings), _describe_keys)
    if settings.batch_folder:
        report.add("batches", lambda: check_folder(settings.batch_folder), lambda _: settings.batch_folder)
    if settings.demo_folder:
        report.add("playground", lambda: Collection(settings, is_bundled_model=False), _describe_collection)
    checkpoints = []
    if settings.has_embedder:
        checkpoints.append(_examine_checkpoint(report, settings, "model"))
    if settings.reranker:
        checkpoints.append(_examine_checkpoint(report, settings, "reranker"))
    _examine_device(report, settings, checkpoints)
    return report


def _examine_checkpoint(report: Report, settings: Settings, kind: Literal["model", "reranker"]) -> Checkpoint | None:
    """The checkpoint, if it is on this machine and can be loaded."""
    if kind == "model":
        name, revision, find = settings.model, settings.revision, find_checkpoint
    else:
        name, revision, find = settings.reranker, settings.reranker_revision, find_reranker
    if not is_on_this_machine(name, revision):
        text = f"{name} is not in the local cache: the service downloads it at its first start"
        report.add(kind, lambda: text)
        return None
    checkpoint = report.add(kind, lambda: find(settings), lambda one: f"{one.name} in {one.folder}")
    if checkpoint is None:
        return None
    folder = checkpoint.folder
    report.add("tokenizer", lambda: check_vocabulary(folder, load_tokenizer(folder)), lambda count: f"{count} tokens")
    report.add("prompt", lambda: check_chat_template(folder), lambda file: file or "none: the published prompt")
    report.add(
        "images",
        lambda: read_vision_config(folder, settings),
        lambda vision: f"{vision.regime.min_pixels} to {vision.regime.max_pixels} pixels after resizing",
    )
    shapes = report.add(
        "weights", lambda: check_weights(folder), lambda found: f"{len(found)}, with the shapes of config.json"
    )
    return checkpoint if shapes else None


def _examine_device(report: Report, settings: Settings, checkpoints: Sequence[Checkpoint | None]) -> None:
    """`checkpoints`: one for each served model; None if it is not on this machine."""
    device = report.add("device", lambda: _usable_device(settings), partial(_describe_device, settings))
    if device is None:
        return
    dtypes = [choose_dtype(settings, device, is_bundled=bool(one and one.is_bundled)) for one in checkpoints]
    names = dict.fromkeys(str(one).removeprefix("torch.") for one in dtypes)
    report.add("data type", lambda: " and ".join(names))
    dtype = dtypes[0]
    if settings.weights:
        report.add(
            "8 bits", lambda: check_weight_format(settings.weights, device, dtype), lambda _: str(settings.weights)
        )
    attention = report.add("attention", lambda: choose_attention(settings.attention, device, dtype)[0])
    report.add("compiler", find_compiler, lambda path: path or "none: layers are compiled on a GPU only with one")
    if attention is not None:
        report.add("execution", lambda: choose_execution(settings.execution, device, attention))
    report.add(
        "workers",
        lambda: settings.num_workers(count_gpus()),
        lambda count: f"{count}; {available_cores()} cores, {settings.preprocess_threads} preprocessing threads each",
    )
    for checkpoint, dtype in zip(checkpoints, dtypes, strict=True):
        if checkpoint:
            report.add("memory", partial(_describe_memory, checkpoint.folder, dtype, device, settings.weights))


def _describe_settings(settings: Settings) -> str:
    return ", ".join(f"{PREFIX}{name.upper()}" for name in sorted(settings.model_fields_set)) or "all defaults"


def _describe_keys(keys: ApiKeys) -> str:
    return "required" if keys.are_needed else "none: every request is accepted"


def _usable_device(settings: Settings) -> torch.device:
    device = choose_device(settings)
    check_device(device)
    return device


def _describe_collection(collection: Collection) -> str:
    return f"{collection.num_pictures} pictures"


def _describe_device(settings: Settings, device: torch.device) -> str:
    if device.type != "cuda":
        driver = unused_driver(settings, device)
        unused = f"; {driver} exists, but this torch finds no GPU" if driver else ""
        return f"{device}, torch {torch.__version__}{unused}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device}, {torch.cuda.get_device_name(device)}, capability {major}.{minor}, torch {torch.__version__}"


def _describe_memory(folder: Path, dtype: torch.dtype, device: torch.device, weight_format: WeightFormat | None) -> str:
    """Raises `ModelUnavailable` if the weights cannot be read or do not fit."""
    needed = check_memory(check_weights(folder), dtype, device, weight_format)
    free = free_bytes(device)
    rest = "" if free is None else f", {free / 2**30:.1f} GiB free"
    return f"{needed / 2**30:.1f} GiB of weights{rest}"
