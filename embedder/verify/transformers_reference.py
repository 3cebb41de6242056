"""The probes embedded by plain transformers, padded, as in the reference code of Qwen3-VL-Embedding."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from embedder.model.weight_files import INDEX, weight_files
from embedder.torchvision_shim import declare_torchvision_operators
from embedder.verify.probes import PROBES, Item, Vector

declare_torchvision_operators()

from qwen_vl_utils.vision_process import process_vision_info  # noqa: E402 - after the declaration
from transformers import (  # noqa: E402 - after the declaration
    PreTrainedConfig,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLProcessor,
)
from transformers.image_utils import load_image  # noqa: E402 - after the declaration
from transformers.models.qwen3_vl.configuration_qwen3_vl import (  # noqa: E402 - after the declaration
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

_OLDER_FIELDS = frozenset({"rope_scaling", "rope_theta"})  # of `rope_parameters`, before transformers 5


@torch.no_grad()
def embed_with_transformers(folder: Path, info: Mapping[str, Any]) -> tuple[list[Vector], list[list[int]]]:
    """Vectors and token ids of the probes. `info`: as `Embedder.info()` returns it.

    Raises `OSError` or `ValueError` if transformers cannot load the checkpoint.
    """
    dtype, device = getattr(torch, info["dtype"]), info["device"]
    processor = Qwen3VLProcessor.from_pretrained(
        folder, padding_side="right", local_files_only=True, trust_remote_code=False
    )
    with _only_safetensors(folder) as weights:
        model = Qwen3VLModel.from_pretrained(  # already in eval mode
            weights,
            config=_read_config(folder),
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
        )
    conversations = [_conversation(item, info) for item in PROBES]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    if info["preprocessing"] == "reference":
        images, _ = process_vision_info(conversations, image_patch_size=16)
        options: dict[str, Any] = {"do_resize": False}
    else:
        parts = [part for conversation in conversations for part in conversation[1]["content"]]
        images = [load_image(part["image"]) for part in parts if "image" in part]
        size = {"shortest_edge": info["pixels"]["min"], "longest_edge": info["pixels"]["max"]}
        options = {"images_kwargs": {"size": size}}
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt", **options).to(device)
    hidden_states = model(**inputs).last_hidden_state
    lengths = inputs["attention_mask"].sum(1)
    vectors = hidden_states[torch.arange(len(PROBES), device=device), lengths - 1].float().cpu().numpy()
    rows = zip(inputs["input_ids"].tolist(), lengths.tolist(), strict=True)
    return [vector / np.linalg.norm(vector) for vector in vectors], [ids[:length] for ids, length in rows]


def _conversation(item: Item, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    limits = {"min_pixels": info["pixels"]["min"], "max_pixels": info["pixels"]["max"]}
    content: list[dict[str, Any]] = []
    if "image" in item:
        image = PIL.Image.open(io.BytesIO(base64.b64decode(item["image"])))
        content.append({"type": "image", "image": image, **limits})
    if "text" in item:
        content.append({"type": "text", "text": item["text"]})
    instruction = item.get("instruction", info["default_instruction"])
    system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
    return [system, {"role": "user", "content": content}]


def _read_config(folder: Path) -> Qwen3VLConfig:
    """The fields of config.json that describe the architecture.

    Some of the others name things for transformers to fetch or import: `attn_implementation`, `auto_map`,
    `transformers_weights`.
    """
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    towers = {
        name: _architecture(fields[name], tower)
        for name, tower in (("text_config", Qwen3VLTextConfig), ("vision_config", Qwen3VLVisionConfig))
    }
    return Qwen3VLConfig(**{**_architecture(fields, Qwen3VLConfig), **towers})


def _architecture(fields: Mapping[str, Any], kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Those of the fields that `kind` itself declares, or declared in older versions."""
    known = (set(kind.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)) | _OLDER_FIELDS
    return {name: value for name, value in fields.items() if name in known}


@contextmanager
def _only_safetensors(folder: Path) -> Iterator[Path]:
    """A temporary folder with links to the weight files of `folder` and to their index, and nothing else.

    transformers also reads pickled weights, and an adapter's base model from the hub, if it finds their files.
    """
    with tempfile.TemporaryDirectory(prefix="qwen3-vl-embedding-weights-") as links:
        for file in (*weight_files(folder), folder / INDEX):
            if file.is_file():
                (Path(links) / file.name).symlink_to(file.resolve())
        yield Path(links)
