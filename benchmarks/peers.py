"""The library and its peers on the same weights, with one interface: items to unit vectors."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from benchmarks.checkpoints import INSTRUCTION
from benchmarks.workloads import Item
from embedder.embedder import Embedder
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from qwen_vl_utils.vision_process import process_vision_info  # noqa: E402 - after the declaration
from transformers import Qwen3VLModel, Qwen3VLProcessor  # noqa: E402 - after the declaration
from transformers.utils import logging  # noqa: E402 - after the declaration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by the names of settings and options
BATCH_SIZE = 32  # of both peers; the default of sentence-transformers
OURS, TRANSFORMERS, SENTENCE_TRANSFORMERS = "ours", "transformers", "sentence-transformers"
OURS_IN_FLOAT32 = "ours, float32"
EXECUTIONS = {"graphs": "CUDA graphs", "compiled": "compiled", "graphs+compiled": "CUDA graphs, compiled"}  # labels

logging.disable_progress_bar()


@dataclass(frozen=True)
class Peer:
    """A library. `embed`: items to (num_items, hidden_size) float32 unit vectors. `close` ends its threads."""

    name: str
    embed: Callable[[list[Item]], NDArray[np.float32]]
    close: Callable[[], None] = lambda: None


def apart(name: str, make: Callable[..., Peer], *arguments: Any) -> Peer:
    """The peer returned by `make`, in its own process.

    In one process, each peer would have an OpenMP thread pool, with more threads than cores in total. libgomp then lets
    them sleep between products: a query of the bundled model took twice as long next to another peer's pool.
    """
    process = ProcessPoolExecutor(1, get_context("spawn"), _make, (make, *arguments))
    return Peer(name, lambda items: process.submit(_embed, items).result(), process.shutdown)


_made: list[Peer] = []  # the peer of a process started by `apart`


def _make(make: Callable[..., Peer], *arguments: Any) -> None:
    _made.append(make(*arguments))


def _embed(items: list[Item]) -> NDArray[np.float32]:
    return _made[0].embed(items)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A Qwen3VLModel with scaled_dot_product_attention."""
    model = Qwen3VLModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False).to(device)


def ours(folder: Path, dtype: torch.dtype, device: torch.device, model: Any = None, **options: Any) -> Peer:
    """The library. If `model` is given, it is used instead of the weights in the folder."""
    name: Literal["bfloat16", "float32"] = "bfloat16" if dtype == torch.bfloat16 else "float32"
    loaded = mock.patch("embedder.loaded_model.load_model", return_value=model) if model is not None else nullcontext()
    with loaded:
        embedder = Embedder(str(folder), device=str(device), dtype=name, **options)
    execution = options.get("execution")
    full_name = f"{OURS}, {EXECUTIONS[execution]}" if execution in EXECUTIONS else OURS
    return Peer(full_name, lambda items: np.stack(embedder.embed(items)), embedder.close)


def loaded_transformers(folder: Path, dtype: torch.dtype, device: torch.device) -> Peer:
    """`padded_transformers` with the folder's weights."""
    return padded_transformers(folder, load_model(folder, dtype, device))


def padded_transformers(folder: Path, model: Any) -> Peer:
    """The published reference code: batches of 32 in the given order, padding, last-token pooling, normalization."""
    processor = Qwen3VLProcessor.from_pretrained(folder, padding_side="right")

    @torch.inference_mode()
    def embed_batch(items: list[Item]) -> NDArray[np.float32]:
        conversations = [_conversation(item) for item in items]
        texts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        images, _ = process_vision_info(conversations, image_patch_size=16)
        inputs = processor(text=texts, images=images, padding=True, do_resize=False, return_tensors="pt")
        states = model(**inputs.to(model.device), use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        rows = states[torch.arange(len(items), device=states.device), last].float()
        return np.asarray(torch.nn.functional.normalize(rows, dim=-1).cpu())

    def embed(items: list[Item]) -> NDArray[np.float32]:
        batches = [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
        return np.concatenate([embed_batch(batch) for batch in batches])

    return Peer(TRANSFORMERS, embed)


def sentence_transformers(folder: Path, dtype: torch.dtype, device: torch.device, model: Any = None) -> Peer:
    """`SentenceTransformer.encode`, which sorts by length. `model`: used instead of the weights in the folder."""
    from sentence_transformers import SentenceTransformer

    pipeline: Any = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": dtype})
    if model is not None:
        pipeline[0].model = model

    def embed(items: list[Item]) -> NDArray[np.float32]:
        inputs = [item["text"] if "text" in item else {"image": decode(item["image"])} for item in items]
        rows = pipeline.encode(inputs, prompt=INSTRUCTION, batch_size=BATCH_SIZE, show_progress_bar=False)
        return np.asarray(rows, np.float32)

    return Peer(SENTENCE_TRANSFORMERS, embed)


def decode(data: bytes) -> PIL.Image.Image:
    """Decode an image as the reference code does."""
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def _conversation(item: Item) -> list[dict[str, Any]]:
    part: dict[str, Any] = {"type": "text", "text": item["text"]} if "text" in item else {"type": "image"}
    if "image" in item:
        part |= {"image": decode(item["image"]), "min_pixels": 4096, "max_pixels": 1_310_720}
    system = {"role": "system", "content": [{"type": "text", "text": INSTRUCTION}]}
    return [system, {"role": "user", "content": [part]}]
