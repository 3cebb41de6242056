"""The service, which writes when each part of its start ends. For `bentoml serve`, started by `benchmarks.starts`."""

from __future__ import annotations

import functools
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = "BENCHMARK_START_TIMES"  # variable with the path of the file; `starts` sets it
IN_PARENT = "bentoml serve, up to the service"
IN_WORKER = "the parent's checks, and the worker's process up to the service"


def ended(part: str) -> None:
    """Write that a part of the start ends now."""
    with Path(os.environ[TIMES]).open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"part": part, "pid": os.getpid(), "s": time.time(), "cpu_s": time.process_time()}) + "\n"
        )


def times(module: Any, name: str, part: str) -> None:
    """Let a function of a module write the end of a part."""
    function = getattr(module, name)

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        ended(part)
        return result

    setattr(module, name, timed)


def time_start(begin: Callable[[Any], None]) -> Callable[[Any], None]:
    """The service's `__init__`, in parts."""

    def timed(service: Any) -> None:
        ended("BentoML's app, up to the model")
        loaded_model = importlib.import_module("embedder.loaded_model")
        models = importlib.import_module("embedder.models")
        ended("import of torch and of the model's modules")
        times(loaded_model, "load_model", "weights")
        times(loaded_model, "arrange_products", "choice of the matrix product, and its layout")
        times(models, "warn_if_slow", "tokenizer, and the estimate of the speed")
        begin(service)
        ended("engine, routes")

    return timed


def time_warm_up(warm_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The service's hook that computes a text and an image."""

    @functools.wraps(warm_up)
    async def timed(service: Any) -> None:
        await warm_up(service)
        ended("first text and picture")

    return timed


is_parent = not Path(os.environ[TIMES]).exists()
ended(IN_PARENT if is_parent else IN_WORKER)
service = importlib.import_module("service")
Qwen3VLEmbedding = service.Qwen3VLEmbedding
ended("service.py in the parent" if is_parent else "service.py in the worker")
inner: Any = Qwen3VLEmbedding.inner
inner.__init__ = time_start(inner.__init__)
inner.warm_up = time_warm_up(inner.warm_up)
