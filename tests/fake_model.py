"""A hand-written model for the engine: a row depends on the item's text, and some texts cause failures."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.engine.device import WaitForRows
from embedder.engine.engine import Engine
from embedder.engine.postprocess import Embedding
from embedder.errors import DeviceFailed, DeviceOutOfMemory, InvalidRequest
from embedder.inputs.decoder import Decoder
from embedder.inputs.items import EmbeddingItem, Text
from embedder.inputs.preprocess import ModelInput
from embedder.settings import Settings

HIDDEN_SIZE = 8


@dataclass
class FakeModel:
    """Records what it is asked to do.

    `gate`: batches and the text "slow" wait until it is set. `is_entered`: set when a batch starts. `batches`: number
    of items of each batch. `capacity`: characters that fit the memory. `preprocessed`: texts in order. `on_batch` is
    called with the number of items of each batch.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    is_entered: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)
    capacity: int = 1_000_000
    preprocessed: list[str] = field(default_factory=list)
    num_launched: int = 0
    on_batch: Callable[[int], None] = lambda _: None
    stream: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def preprocess(self, item: EmbeddingItem, decoder: Decoder | None = None) -> ModelInput:
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
        if part.text == "limit":
            raise OSError(errno.EMFILE, "Too many open files")
        if part.text == "interrupted":
            raise KeyboardInterrupt
        if part.text == "panic":
            raise BaseException("a panic in a library")  # as tokenizers raises a panic in Rust
        ids = np.frombuffer(part.text.encode(), np.uint8).astype(np.int64)
        return ModelInput(ids, np.zeros((3, len(ids)), np.int64), np.empty(0, np.int64), (), 0, 0, len(ids))

    def launch(self, inputs: list[ModelInput]) -> WaitForRows:
        """As on a CPU: the launch computes."""
        rows = self.run(inputs)
        return lambda: rows

    def launch_ahead(self, inputs: list[ModelInput]) -> WaitForRows:
        """As on a GPU: batches are queued on the device, which computes them one after the other."""
        self.num_launched += 1
        return self.stream.submit(self.run, inputs).result

    def run(self, inputs: list[ModelInput]) -> NDArray[np.float32]:
        self.is_entered.set()
        self.gate.wait(timeout=30)
        self.batches.append(len(inputs))
        self.on_batch(len(inputs))
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


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails after 60 s."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def busy_device(engine: Engine, model: FakeModel) -> Iterator[None]:
    """The item "holder" occupies the device during the block."""
    model.gate.clear()
    model.is_entered.clear()
    holder = engine.submit(item("holder"))
    assert model.is_entered.wait(10)
    yield
    model.gate.set()
    holder.result(10)


def submit_together(
    engine: Engine, model: FakeModel, texts: Sequence[str], num_launched: int = 0
) -> list[Future[Embedding]]:
    """Submit the texts while the device is busy, so that they run in one batch if they fit.

    `num_launched`: how many of them an engine that launches ahead may take at once.
    """
    with busy_device(engine, model):
        futures = [engine.submit(item(text)) for text in texts]
        wait_until(lambda: len(engine._inputs) >= len(texts) - num_launched)
    return futures


@contextmanager
def running(model: FakeModel, **settings: Any) -> Iterator[Engine]:
    """An engine with this model. At the end the gate is opened and the engine closed."""
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, Settings(**settings))
    try:
        yield engine
    finally:
        model.gate.set()
        engine.close()
