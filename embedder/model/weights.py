"""Checkpoint folder to transformers' Qwen3VLModel on the device, with every weight of it loaded."""

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
    """The device of worker number `worker`, counted from 0. `auto` assigns GPUs round-robin; without a GPU, the CPU."""
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
    """FLOPs of the vision tower for one visual token, in units of one token of the language tower.

    Each tower takes two FLOPs for each weight and row. A visual token is `spatial_merge_size`^2 rows in the blocks and
    one row in the mergers. Attention is left out: it is some percent of the total at the usual lengths.
    """
    vision: Any = model.visual
    blocks, mergers = (vision.patch_embed, vision.blocks), (vision.merger, vision.deepstack_merger_list)
    vision_weights = vision.spatial_merge_size**2 * sum(map(_num_weights, blocks)) + sum(map(_num_weights, mergers))
    language: Any = model.language_model
    return float(vision_weights / _num_weights(language.layers))


def _num_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Weights in `dtype` on `device`, in eval mode and without gradients.

    Accepts keys with and without the prefix of the conditional-generation class. Raises `ModelUnavailable` if a file or
    a weight is missing (transformers would continue with random numbers), or if the weights do not fit the device.
    """
    check_memory(folder, dtype, device)
    try:
        loaded: Any = Qwen3VLModel.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # SafetensorError: a truncated file
        raise ModelUnavailable(f"cannot load {folder}: {error}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if missing := sorted(report["missing_keys"]):
        raise ModelUnavailable(f"{folder} lacks {len(missing)} weights, e.g. {missing[0]}")
    model.requires_grad_(False)
    return model
