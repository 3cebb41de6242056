"""A target as a model of mteb: embeds batches of texts, images or both with the instruction of the task."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import PIL.Image
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.quality.targets import Item, name_of
from benchmarks.quality.vectors import Vectors
from embedder.inputs.prompt import QUERY_INSTRUCTION

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


class EmbedderModel(AbsEncoder):
    """The model for `mteb.evaluate`."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        info = vectors.target.info
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name_of(info),
                "revision": info["revision"] or None,
                "modalities": ["text", "image"],
                "embed_dim": info["hidden_size"],
                "max_tokens": info["limits"]["max_input_tokens"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "experiment_kwargs": preprocessing_of(info),
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """(num_inputs, hidden_size). `inputs` are batches, each a mapping of `text` and `image` to lists."""
        instruction = instruction_for(task_metadata, prompt_type)
        what = f"{task_metadata.name} {hf_subset} {hf_split} {prompt_type.value if prompt_type else ''}"
        batches = tqdm(inputs, desc=what, unit="batch")
        return np.concatenate([self.vectors.embed(list(items_of(batch)), instruction) for batch in batches])


def preprocessing_of(info: dict[str, Any]) -> dict[str, Any]:
    """What scores depend on in addition to the checkpoint. mteb keeps the results of each apart.

    Weights of 8 bits are named; without them the result is as in versions that had only one format.
    """
    about = {"preprocessing": info["preprocessing"], "max_pixels": info["pixels"]["max"], "dtype": info["dtype"]}
    weights = info.get("weights", info["dtype"])  # missing in older services
    return about if weights == info["dtype"] else {**about, "weights": weights}


def instruction_for(metadata: TaskMetadata, prompt_type: PromptType | None) -> str | None:
    """The instruction according to the model card: queries use the task's prompt or the default query instruction,
    documents none. In tasks without queries and documents (classification, clustering, similarity), every input uses
    the task's prompt.
    """
    if isinstance(metadata.prompt, str) and prompt_type == PromptType.document:
        return None
    return prompt_of(metadata, prompt_type) or (QUERY_INSTRUCTION if prompt_type == PromptType.query else None)


def prompt_of(metadata: TaskMetadata, prompt_type: PromptType | None) -> str | None:
    """The task's own prompt; None if it has none."""
    prompt = metadata.prompt
    return prompt.get(prompt_type.value if prompt_type else "query") if isinstance(prompt, dict) else prompt


def items_of(batch: dict[str, Any]) -> Iterator[Item]:
    """Items from the columns of a batch. Images are PNG, so that service and library get the same bytes."""
    columns = {name: batch[name] for name in ("text", "image") if name in batch}
    for values in zip(*columns.values(), strict=True):
        item = dict(zip(columns, values, strict=True))
        yield {**item, "image": png(item["image"])} if "image" in item else item


def png(image: PIL.Image.Image) -> bytes:
    """Encode losslessly, with fast compression."""
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
