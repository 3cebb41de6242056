"""Checkpoint folder -> transformers' Qwen3VLModel on the device, every weight accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from embedder.errors import ModelUnavailable
from embedder.model.memory import check_memory
from embedder.settings import Settings
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from transformers import PreTrainedModel, Qwen3VLModel  # noqa: E402 - after the declaration


def choose_device(settings: Settings, worker: int = 0) -> torch.device:
    """The device of worker number `worker` (from 0): with `auto`, the GPUs in turn, or the CPU where there is none."""
    if settings.device == "auto":
        count = torch.cuda.device_count()
        return torch.device("cuda", worker % count) if count else torch.device("cpu")
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ModelUnavailable(f"EMBEDDER_DEVICE={settings.device!r}: allowed are auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelUnavailable(f"EMBEDDER_DEVICE={settings.device!r}: allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ModelUnavailable(f"EMBEDDER_DEVICE={settings.device!r}, but this machine has {found} GPUs")
    return device


def visual_cost(model: PreTrainedModel) -> float:
    """What the vision tower computes for one visual token, in tokens of the language tower.

    Both do two operations with each weight for each row: patches in the blocks, `merge_size`^2 of them a token, tokens
    in the mergers and in the language layers. Attention, some percent at these lengths, is left out.
    """
    vision: Any = model.visual
    blocks, mergers = (vision.patch_embed, vision.blocks), (vision.merger, vision.deepstack_merger_list)
    of_vision = vision.spatial_merge_size**2 * sum(map(_num_weights, blocks)) + sum(map(_num_weights, mergers))
    language: Any = model.language_model
    return float(of_vision / _num_weights(language.layers))


def _num_weights(module: torch.nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Weights in `dtype` on `device`, for inference (`from_pretrained` leaves the model in eval mode).

    Keys may or may not carry the prefix of the conditional-generation class. Raises `ModelUnavailable` if files are
    missing or the checkpoint lacks a weight (transformers would go on with random numbers in its place), or if they
    cannot fit the device.
    """
    check_memory(folder, dtype, device)
    try:
        loaded: Any = Qwen3VLModel.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last: a file cut short
        raise ModelUnavailable(f"cannot load {folder}: {error}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if missing := sorted(report["missing_keys"]):
        raise ModelUnavailable(f"{folder} lacks {len(missing)} weights, e.g. {missing[0]}")
    model.requires_grad_(False)
    return model
