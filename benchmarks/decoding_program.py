"""Preprocesses pictures and clips with the engine of the tree that PYTHONPATH names; `benchmarks.decoding` starts it.

    decoding_program.py ITEMS CHECKPOINT [--threads]

ITEMS: a JSON file of lists of items, by kind. Each line of the input is a JSON list, a kind and a number of items. The
answer is the seconds that they take with a model that computes nothing, or null if the tree cannot read them. It uses
only what old trees have too.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.library import load_preprocessor
from embedder.engine import preprocess_workers
from embedder.engine.engine import Engine
from embedder.errors import InvalidMedia
from embedder.inputs.items import EmbeddingItem, Image, Video
from embedder.settings import Settings

HIDDEN_SIZE = 64
PARTS = {"image": Image, "video": Video}


def main(items_file: str, checkpoint: str, *options: str) -> None:
    kinds = {
        kind: [EmbeddingItem((PARTS[name](base64.b64decode(data)),)) for name, data in items]
        for kind, items in json.loads(Path(items_file).read_text(encoding="ascii")).items()
    }
    if "--threads" in options:
        mock.patch.object(preprocess_workers, "can_start_processes", return_value=False).start()
    try:
        from embedder.model.memory import keep_freed_memory  # as a model does when it is loaded
    except ImportError:
        pass
    else:
        keep_freed_memory()
    engine = Engine(load_preprocessor(Path(checkpoint)), _compute_nothing, HIDDEN_SIZE, Settings())
    for line in sys.stdin:
        kind, num_items = json.loads(line)
        print(json.dumps(_seconds(engine, kinds[kind], num_items)), flush=True)
    engine.close()


def _seconds(engine: Engine, items: list[EmbeddingItem], num_items: int) -> float | None:
    begin_s = time.perf_counter()
    try:
        for future in [engine.submit(items[number % len(items)]) for number in range(num_items)]:
            future.result()
    except InvalidMedia:
        return None
    return time.perf_counter() - begin_s


def _compute_nothing(inputs: list[object]) -> object:
    rows = np.ones((len(inputs), HIDDEN_SIZE), np.float32)
    return lambda: rows


if __name__ == "__main__":
    main(*sys.argv[1:])
