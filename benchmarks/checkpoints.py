"""Random checkpoints that the engine, transformers and sentence-transformers can load."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.random_checkpoint import SHAPES, build_tokenizer, shape_config, write_checkpoint

INSTRUCTION = "Represent the user's input."  # the default of the engine and of the reference code

_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
_SENTENCE_TRANSFORMERS: dict[str, Any] = {  # as SentenceTransformer.save writes them (6.2.0)
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        },
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.base.modules.normalize.Normalize",
        },
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": _FORWARD,
            "image": _FORWARD,
            "video": _FORWARD,
            "message": {**_FORWARD, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    },
    "1_Pooling/config.json": {"pooling_mode": "lasttoken", "include_prompt": True},
    "2_Normalize/config.json": {},
}


@cache
def tokenizer() -> Any:
    """A tokenizer with 6144 ids, trained on the English text of Python's help."""
    return build_tokenizer(topics.values(), vocab_size=6144)


def write_folder(folder: Path, shape: str) -> None:
    """Write a float32 checkpoint of `shape`, and the additional files of sentence-transformers."""
    config = shape_config(shape, tokenizer())
    write_checkpoint(folder, config, tokenizer())
    for name, content in _SENTENCE_TRANSFORMERS.items():
        if name.startswith("1_Pooling"):
            content = {"embedding_dimension": config.get_text_config().hidden_size, **content}
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_few_layers(folder: Path, shape: str, *, text: int, vision: int, dtype: str) -> None:
    """Write a checkpoint of `shape` with so many layers of each tower, and a small vocabulary."""
    places = range(1, 1 + len(SHAPES[shape]["vision"]["deepstack_visual_indexes"]))
    config = shape_config(
        shape,
        tokenizer(),
        text={"num_hidden_layers": text, "vocab_size": len(tokenizer())},
        vision={"depth": vision, "deepstack_visual_indexes": list(places)},
    )
    write_checkpoint(folder, config, tokenizer(), dtype=dtype)


@contextmanager
def random_folder(shape: str) -> Iterator[Path]:
    """A temporary checkpoint folder of `shape`."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        write_folder(Path(folder), shape)
        yield Path(folder)
