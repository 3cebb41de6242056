"""Checkpoint folder to transformers' Qwen3VLModel on the device, with every weight of it loaded."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from embedder.errors import ModelUnavailable
from embedder.model.memory import check_memory
from embedder.model.progress import LoggedProgress
from embedder.model.weight_files import INDEX, Shape, check_shapes, weight_files
from embedder.settings import Settings
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from transformers import PreTrainedConfig, PreTrainedModel, Qwen3VLConfig, Qwen3VLModel  # noqa: E402 - after it
from transformers.models.qwen3_vl.configuration_qwen3_vl import (  # noqa: E402
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

# Its records go to the handlers of the program, or of the service, instead of to standard error
transformers_logging.disable_default_handler()
transformers_logging.enable_propagation()
transformers_logging.set_tqdm_hook(lambda _, args, kwargs: LoggedProgress(*args, **kwargs))

logger = logging.getLogger(__name__)

_OLDER_FIELDS = frozenset({"rope_scaling", "rope_theta"})  # of `rope_parameters`, before transformers 5


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


def choose_dtype(settings: Settings, device: torch.device, *, is_bundled: bool) -> torch.dtype:
    """The data type of the weights.

    `auto` is bfloat16 on CUDA, and on a CPU that multiplies bfloat16 itself. The bundled model stays in float32 on a
    CPU: it is small, and its recorded vectors are those of float32.
    """
    if settings.dtype == "auto":
        is_16_bit = device.type == "cuda" or (not is_bundled and cpu_multiplies_bfloat16())
    else:
        is_16_bit = settings.dtype == "bfloat16"
    return torch.bfloat16 if is_16_bit else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16 (AVX512-BF16 or AMX).

    Without them, torch converts every value.
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def visual_cost(model: PreTrainedModel) -> float:
    """FLOPs of the vision tower for one visual token, in units of one token of the language tower.

    Each tower takes two FLOPs for each weight and row. A visual token is `spatial_merge_size`^2 rows in the blocks and
    one row in the mergers. Attention is left out: it is some percent of the total at the usual lengths.
    """
    vision: Any = model.visual
    blocks, mergers = (vision.patch_embed, vision.blocks), (vision.merger, vision.deepstack_merger_list)
    vision_weights = vision.spatial_merge_size**2 * sum(map(_num_weights, blocks)) + sum(map(_num_weights, mergers))
    return float(vision_weights / num_language_weights(model))


def num_language_weights(model: PreTrainedModel) -> int:
    """Number of weights of the language tower's layers."""
    tower: Any = model.language_model
    return _num_weights(tower.layers)


def _num_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Weights in `dtype` on `device`, in eval mode and without gradients.

    Accepts keys with and without the prefix of the conditional-generation class. Raises `ModelUnavailable` if a file or
    a weight is missing (transformers would continue with random numbers), if a shape is not the one that config.json
    describes, or if the weights do not fit the device. All of this is known before memory is allocated.
    """
    config = read_config(folder)
    if unexpected := check_shapes(folder, _shapes(folder, config)):
        logger.warning("%s has %d weights that are not used, e.g. %s", folder, len(unexpected), unexpected[0])
    size, dtype_name = check_memory(folder, dtype, device), str(dtype).removeprefix("torch.")
    logger.info("loading %s: %.1f GB of weights as %s, to %s", folder, size / 1e9, dtype_name, device)
    with only_safetensors(folder) as weights, _without_warnings():
        try:
            loaded: Any = Qwen3VLModel.from_pretrained(
                weights,
                config=config,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",  # otherwise a name in config.json can be that of a kernel on the hub
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:  # the last: a truncated file
            raise ModelUnavailable(f"cannot load {folder}: {error}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if missing := sorted(report["missing_keys"]):
        raise ModelUnavailable(f"{folder} lacks {len(missing)} weights, e.g. {missing[0]}")
    model.requires_grad_(False)
    return model


def _shapes(folder: Path, config: Qwen3VLConfig) -> dict[str, Shape]:
    """The shape of each weight of the model that `config` describes. Allocates none of them."""
    try:
        with torch.device("meta"):
            model = Qwen3VLModel(config)
    except (ValueError, RuntimeError, KeyError, TypeError, ZeroDivisionError) as error:  # a name or a size in it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelUnavailable(f"cannot use {folder / 'config.json'}: {reason}") from error
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' tables of unused weights; `check_shapes` has told what matters."""
    report = logging.getLogger("transformers")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        yield
    finally:
        report.setLevel(level)


def read_config(folder: Path) -> Qwen3VLConfig:
    """The fields of config.json that describe the architecture; all others are dropped.

    Some of the others name things for transformers to fetch or import: `attn_implementation`, `quantization_config`,
    `auto_map`, `transformers_weights`. Raises `ModelUnavailable`.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if fields.get("quantization_config") is not None:
            raise ValueError("quantization_config: quantized weights are not supported; allowed: float weights")
        for name in ("text_config", "vision_config"):
            if not isinstance(fields.get(name), dict):  # transformers would take the sizes of another model
                raise ValueError(f"{name} is {fields.get(name)!r}; allowed: an object with the sizes of the tower")
        towers = {
            name: _architecture(fields[name], tower)
            for name, tower in (("text_config", Qwen3VLTextConfig), ("vision_config", Qwen3VLVisionConfig))
        }
        return Qwen3VLConfig(**{**_architecture(fields, Qwen3VLConfig), **towers})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelUnavailable(f"cannot use {folder / 'config.json'}: {error}") from error


def _architecture(fields: Mapping[str, Any], kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Those of the fields that `kind` itself declares, or declared in older versions."""
    known = (set(kind.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)) | _OLDER_FIELDS
    return {name: value for name, value in fields.items() if name in known}


@contextmanager
def only_safetensors(folder: Path) -> Iterator[Path]:
    """A temporary folder with links to the weight files of `folder` and to their index, and nothing else.

    transformers also reads pickled weights, and an adapter's base model from the hub, if it finds their files.
    Raises `ModelUnavailable` if a file is missing.
    """
    files = weight_files(folder)
    with tempfile.TemporaryDirectory(prefix="qwen3-vl-embedding-weights-") as links:
        for file in (*files, folder / INDEX):
            if file.is_file():
                (Path(links) / file.name).symlink_to(file.resolve())
        yield Path(links)
