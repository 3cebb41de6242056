"""The probes embedded by plain transformers, padded, as in the reference code of Qwen3-VL-Embedding."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from embedder.model.weights import only_safetensors, read_config
from embedder.torchvision_shim import declare_torchvision_operators
from embedder.verify.probes import PROBES, Item, Vector

declare_torchvision_operators()

from qwen_vl_utils.vision_process import process_vision_info  # noqa: E402 - after the declaration
from transformers import Qwen3VLModel, Qwen3VLProcessor  # noqa: E402 - after the declaration
from transformers.image_utils import load_image  # noqa: E402 - after the declaration


@torch.no_grad()
def embed_with_transformers(folder: Path, info: Mapping[str, Any]) -> tuple[list[Vector], list[list[int]]]:
    """Vectors and token ids of the probes. `info`: as `Embedder.info()` returns it.

    Raises `OSError` or `ValueError` if transformers cannot load the checkpoint.
    """
    dtype, device = getattr(torch, info["dtype"]), info["device"]
    processor = Qwen3VLProcessor.from_pretrained(
        folder, padding_side="right", local_files_only=True, trust_remote_code=False
    )
    with only_safetensors(folder) as weights:
        model = Qwen3VLModel.from_pretrained(  # already in eval mode
            weights,
            config=read_config(folder),
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
