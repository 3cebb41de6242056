"""Checkpoint folder to both towers on the device, with every weight of it loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from embedder.errors import ModelUnavailable
from embedder.model.architecture import Architecture, read_architecture
from embedder.model.compact_table import CompactTable, stores_compactly
from embedder.model.eight_bit import EightBitLinear, use_eight_bit_layers
from embedder.model.memory import check_memory
from embedder.model.modules import Towers
from embedder.model.progress import LoggedProgress
from embedder.model.weight_files import Shape, check_shapes, trunk_name, weight_files
from embedder.settings import WeightFormat

logger = logging.getLogger(__name__)

# A file is mapped while it is read, and its pages count as the process's memory. It is reopened after this many bytes.
MAX_MAPPED_BYTES = 2**28


def visual_cost(model: Towers) -> float:
    """FLOPs of the vision tower for one visual token, in units of one token of the language tower.

    Each tower takes two FLOPs for each weight and row. A visual token is `spatial_merge_size`^2 rows in the blocks and
    one row in the mergers. Attention is left out: it is a few percent of the total at the usual lengths.
    """
    vision = model.visual
    blocks, mergers = (vision.patch_embed, vision.blocks), (vision.merger, vision.deepstack_merger_list)
    patches_per_token = vision.config.spatial_merge_size**2
    vision_weights = patches_per_token * sum(map(_num_weights, blocks)) + sum(map(_num_weights, mergers))
    return vision_weights / num_language_weights(model)


def vision_digest(model: Towers) -> bytes:
    """Identifies the weights of the vision tower as they are loaded. Takes about a second for a gigabyte."""
    digest = hashlib.blake2b(digest_size=32)
    for name, weight in sorted(model.visual.state_dict().items()):
        digest.update(repr((name, tuple(weight.shape), weight.dtype)).encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def num_language_weights(model: Towers) -> int:
    """Number of weights of the language tower's layers."""
    return _num_weights(model.language_model.layers)


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, weight_format: WeightFormat | None = None
) -> Towers:
    """Weights in `dtype` on `device`, in eval mode and without gradients.

    With `weight_format`, the weights of the layers get 8 bits while they are read, one after the other.

    Accepts keys with and without the prefix of the conditional-generation class. Raises `ModelUnavailable` if a file or
    a weight is missing, if a shape is not the one that config.json describes, or if the weights do not fit the device.
    All of this is known before memory is allocated.
    """
    model, shapes, unexpected = _describe_checked(folder)
    if unexpected:
        logger.warning("%s has %d weights that are not used, e.g. %s", folder, len(unexpected), unexpected[0])
    size, dtype_name = check_memory(shapes, dtype, device, weight_format), str(dtype).removeprefix("torch.")
    formats = f"{dtype_name} and {weight_format}" if weight_format else dtype_name
    logger.info("loading %s: %.1f GB of weights as %s, to %s", folder, size / 1e9, formats, device)
    if weight_format:
        use_eight_bit_layers(model, weight_format, dtype)
    if stores_compactly(weight_format, dtype, device):
        model.language_model.set_submodule(
            "embed_tokens", CompactTable(*model.language_model.embed_tokens.weight.shape)
        )
    with LoggedProgress(total=size, desc="loading weights", unit="B", unit_scale=True) as progress:
        for path in weight_files(folder):
            try:
                for name, weight in _tensors(path, shapes):
                    progress.update(_set_weight(model, name, weight, dtype, device))
            except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: no memory is left after all
                raise ModelUnavailable(f"cannot load {path}: {error}") from error
    return model.eval()


def check_weights(folder: Path) -> dict[str, Shape]:
    """Compare the files with config.json without loading them. Returns the shapes of the weights that are used.

    Raises `ModelUnavailable`, as `load_model` does.
    """
    return _describe_checked(folder)[1]


def check_vocabulary(folder: Path, tokenizer: Tokenizer) -> int:
    """The number of token ids. Raises `ModelUnavailable` if one of them has no embedding in the model."""
    num_embeddings = read_architecture(folder).text_config.vocab_size
    token, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
    if largest >= num_embeddings:
        raise ModelUnavailable(
            f"{folder / 'tokenizer.json'}: token {token!r} has the id {largest}; allowed: less than "
            f"{num_embeddings}, the vocab_size of config.json's text_config. The files belong to two "
            "different checkpoints"
        )
    return int(largest) + 1


def _describe_checked(folder: Path) -> tuple[Towers, dict[str, Shape], list[str]]:
    """The modules on the meta device, the shapes of their weights, and the names of weights that are not used.

    The shapes are those of the files, too: others raise `ModelUnavailable`.
    """
    model = describe_model(folder, read_architecture(folder))
    shapes: dict[str, Shape] = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    return model, shapes, check_shapes(folder, shapes)


def describe_model(folder: Path, config: Architecture) -> Towers:
    """The modules that `config` describes, on the meta device, which allocates no weights."""
    try:
        with torch.device("meta"):
            return Towers(config)
    except (RuntimeError, OverflowError) as error:  # a size in it is too large for torch
        reason = " ".join(str(error).split())
        raise ModelUnavailable(f"cannot use {folder / 'config.json'}: {reason}") from error


def _tensors(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a file that are `wanted`, by the trunk's names. Raises `ModelUnavailable` for integers."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if trunk_name(name) in wanted]  # noqa: SIM118 - no dict
    while names:
        num_read = 0
        with safe_open(path, framework="pt") as file:
            while names and num_read < MAX_MAPPED_BYTES:
                name = names.pop(0)
                weight = file.get_tensor(name)
                if not weight.is_floating_point():
                    kind = str(weight.dtype).removeprefix("torch.")
                    raise ModelUnavailable(f"{path}: {name} is {kind}; quantized weights are not supported, floats are")
                num_read += weight.nbytes
                yield trunk_name(name), weight


def _set_weight(model: Towers, name: str, weight: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Replace one weight on the meta device. Returns its bytes."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, EightBitLinear) and attribute == "weight":
        owner.quantize(weight.to(device))
        return owner.weight.nbytes + owner.scale.nbytes
    if isinstance(owner, CompactTable):
        owner.compress(weight.to(dtype))
        return owner.fractions.nbytes + owner.codes.nbytes + owner.largest.nbytes
    # a copy: `weight` is a view of the file, which may be replaced while the service runs
    copied = nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)
    setattr(owner, attribute, copied)
    return copied.nbytes
