"""A hand-written model for the engine: a row is what its text says, and some texts break things."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.engine.engine import Engine, WaitForRows
from embedder.engine.postprocess import Embedding
from embedder.errors import DeviceFailed, DeviceOutOfMemory, InvalidRequest
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.preprocess import ModelInput
from embedder.settings import Settings

HIDDEN_SIZE = 8


@dataclass
class FakeModel:
    """Counts batches; can be told to wait, to fail on a poisoned item, or to give something that is not a number.

    `capacity`: how many characters fit its memory together. `is_entered`: a batch was begun. `preprocessed`: the
    texts, in order.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    is_entered: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)
    capacity: int = 1_000_000
    seconds_per_item: float = 0.0
    preprocessed: list[str] = field(default_factory=list)
    num_launched: int = 0
    stream: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def preprocess(self, item: EmbeddingItem) -> ModelInput:
        (part,) = item.parts
        assert isinstance(part, Text)
        if part.text == "slow":
            self.gate.wait(timeout=30)
        self.preprocessed.append(part.text)
        if part.text == "malformed":
            raise InvalidRequest("malformed")
        if part.text == "undecodable":
            try:
                int("x")
            except ValueError as error:
                raise InvalidRequest("undecodable") from error
        if part.text == "bug":
            raise ZeroDivisionError("a bug in preprocessing")
        if part.text == "interrupted":
            raise KeyboardInterrupt
        if part.text == "panic":
            raise BaseException("a panic in a library")  # as tokenizers raises what panics in Rust
        ids = np.frombuffer(part.text.encode(), np.uint8).astype(np.int64)
        return ModelInput(ids, np.zeros((3, len(ids)), np.int64), np.empty(0, np.int64), (), 0, 0, len(ids))

    def launch(self, inputs: list[ModelInput]) -> WaitForRows:
        rows = self.run(inputs)
        return lambda: rows

    def launch_ahead(self, inputs: list[ModelInput]) -> WaitForRows:
        """As on a GPU: batches queue up there, and are computed one after the other."""
        self.num_launched += 1
        return self.stream.submit(self.run, inputs).result

    def run(self, inputs: list[ModelInput]) -> NDArray[np.float32]:
        self.is_entered.set()
        self.gate.wait(timeout=30)
        self.batches.append(len(inputs))
        time.sleep(self.seconds_per_item * len(inputs))
        if sum(one.num_tokens for one in inputs) > self.capacity:
            raise DeviceOutOfMemory("full")
        texts = [bytes(one.input_ids.astype(np.uint8)).decode() for one in inputs]
        if "poison" in texts:
            raise RuntimeError("secret internals")
        if "assert" in texts:
            raise DeviceFailed("device-side assert")
        return np.stack([row(text) for text in texts])


def row(text: str) -> NDArray[np.float32]:
    if text == "infinite":
        return np.full(HIDDEN_SIZE, np.inf, np.float32)
    return np.random.default_rng(sum(text.encode())).normal(size=HIDDEN_SIZE).astype(np.float32)


def unit(text: str) -> NDArray[np.float32]:
    return row(text) / np.linalg.norm(row(text))


def item(text: str, **options: Any) -> EmbeddingItem:
    return EmbeddingItem((Text(text),), **options)


def held_back(engine: Engine, model: FakeModel, texts: list[str], num_launched: int = 0) -> list[Future[Embedding]]:
    """Submit behind an item that holds the device until all of them wait, so that they run together.

    `num_launched`: of an engine that launches ahead, how many of them at the most do not wait.
    """
    model.gate.clear()
    model.is_entered.clear()
    holder = engine.submit(item("holder"))
    assert model.is_entered.wait(10)
    futures = [engine.submit(item(text)) for text in texts]
    deadline = time.monotonic() + 10
    while len(engine._inputs) < len(texts) - num_launched and time.monotonic() < deadline:
        time.sleep(0.001)
    model.gate.set()
    wait([holder], timeout=10)
    return futures


@contextmanager
def running(model: FakeModel, **settings: Any) -> Iterator[Engine]:
    """An engine with this model; at the end the model waits no more, and the engine is closed."""
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(**settings))
    yield engine
    model.gate.set()
    engine.close()
