"""Plain Python values -> vectors: the engine with a real model behind it, for programs and for the service."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Self

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from embedder.engine.engine import Engine, WaitForRows
from embedder.engine.observer import Observer
from embedder.engine.postprocess import Embedding
from embedder.errors import DeviceOutOfMemory, InvalidRequest, ModelUnavailable, attributed_to_item
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, Text, item_from_fields
from embedder.inputs.preprocess import ModelInput, Preprocessor, load_tokenizer, read_vision_config
from embedder.model.checkpoint import find_checkpoint
from embedder.model.cuda_graphs import TextGraphs, graph_size
from embedder.model.device_errors import device_errors
from embedder.model.forward import Forward
from embedder.model.memory_budget import find_budget
from embedder.model.packing import pack
from embedder.model.pooling import pool
from embedder.model.weights import choose_device, load_model, visual_cost
from embedder.settings import Settings, available_cores

logger = logging.getLogger(__name__)

LIMITS = (
    "max_input_tokens",
    "max_items_per_request",
    "max_body_bytes",
    "max_held_bytes",
    "max_text_chars",
    "max_image_bytes",
    "max_image_pixels",
    "max_video_bytes",
    "max_video_frames",
    "max_queued_tokens",
    "url_hosts",
    "url_timeout_s",
    "decode_timeout_s",
    "request_timeout_s",
)

STUCK_AFTER_S = 300.0  # default on a GPU, where no batch takes a tenth of that

Item = str | PIL.Image.Image | Mapping[str, Any] | EmbeddingItem


class Embedder:
    """A loaded checkpoint that embeds text, images, clips and mixtures of them.

    `model` is a checkpoint folder or hub id; without one the small model shipped in the package is used. Threads run
    until `close` or the end of a `with` block. `worker` chooses the GPU where there are several; `observer` is told
    what becomes of the items. `on_failure` is told why, when the device is lost and nothing more can be embedded in
    this process (`Engine`). Other settings are those of `Settings`, by name. Raises `ModelUnavailable`.
    """

    def __init__(
        self,
        model: str = "",
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        settings: Settings | None = None,
        worker: int = 0,
        observer: Observer | None = None,
        on_failure: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        start = time.monotonic()
        self.settings = settings or Settings(model=str(model or ""), device=device, dtype=dtype, **options)
        self.checkpoint = find_checkpoint(self.settings)
        self.device = choose_device(self.settings, worker)
        if self.settings.cuda_graphs and self.device.type != "cuda":
            raise ModelUnavailable(f"EMBEDDER_CUDA_GRAPHS needs a GPU; the device is {self.device}")
        if self.device.type == "cpu":  # torch would take every core of the machine, in each worker and under any quota
            share = max(1, available_cores() // self.settings.num_workers(torch.cuda.device_count()))
            torch.set_num_threads(min(torch.get_num_threads(), share))
        # A thread that computes keeps a team of threads. With one beside the engine's there are more than cores, and
        # OpenMP lets them sleep between any two products: a query took 6.4 ms instead of 3 (`python -m
        # training.evaluate`, 2 cores, 2026-11-25).
        with ThreadPoolExecutor(1) as passing:
            passing.submit(self._load).result()
        self.engine = Engine(
            self.preprocessor,
            self._launch,
            self.forward.hidden_size,
            self._within_memory() if self.device.type == "cuda" else self.settings,
            observer=observer,
            max_in_flight=2 if self.device.type == "cuda" else 1,
            stuck_after_s=self.settings.stuck_after_s or (STUCK_AFTER_S if self.device.type == "cuda" else math.inf),
            on_failure=on_failure,
        )
        self._announce(time.monotonic() - start)

    def embed(
        self, items: Iterable[Item], *, instruction: str | None = None, dimensions: int | None = None
    ) -> list[NDArray[np.float32]]:
        """One unit vector for each item, in order, each (dimensions,) float32.

        An item is a text, a PIL image, an `EmbeddingItem`, or a mapping with `text`, `image` (encoded bytes, base64,
        PIL, or a URL as far as `url_hosts` goes), `video` (likewise, or a list of frames) or `content` (parts in your
        order), and optionally its own `instruction`, `dimensions` and `truncate`; those given here serve the others.
        Raises the first faulty item's `EmbedderError`, with its index.
        """
        vectors: list[NDArray[np.float32]] = []
        futures: deque[Future[Embedding]] = deque()  # of the items behind those whose vectors are there
        request = object()

        def take_first() -> None:
            with attributed_to_item(len(vectors)):
                vectors.append(futures[0].result().vector)
            futures.popleft()

        try:
            for index, item in enumerate(items):
                with attributed_to_item(index):
                    one = _to_item(item, instruction, dimensions)
                    futures.append(self.engine.submit(one, request=request, wait=True))
                while futures and futures[0].done():
                    take_first()
            while futures:
                take_first()
        finally:
            for future in futures:
                future.cancel()  # those still waiting, after an error
        return vectors

    def info(self) -> dict[str, Any]:
        """What is served, for `/info`: model, sizes, limits, device."""
        vision = self.preprocessor.vision
        return {
            "model": self.checkpoint.name,
            "revision": self.checkpoint.revision,
            "is_bundled_model": self.checkpoint.is_bundled,
            "hidden_size": self.forward.hidden_size,
            "default_instruction": self.settings.default_instruction,
            "pixels": {"min": vision.min_pixels, "max": vision.max_pixels, "multiple_of": vision.factor},
            "device": str(self.device),
            "dtype": str(self.forward.dtype).removeprefix("torch."),
            "attention": self.forward.attention_name,
            "limits": {name: getattr(self.settings, name) for name in LIMITS},
        }

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self) -> None:
        weights = load_model(self.checkpoint.folder, _choose_dtype(self.settings, self.device), self.device)
        vision = read_vision_config(self.checkpoint.folder, self.settings)
        self.preprocessor = Preprocessor(
            load_tokenizer(self.checkpoint.folder), vision, self.settings, visual_cost=visual_cost(weights)
        )
        self.forward = Forward(weights, vision, self.settings.attention, is_compiled=self.settings.torch_compile)
        if self.settings.torch_compile:
            self._compile()
        self.graphs = self._record_graphs() if self.settings.cuda_graphs else None

    def _within_memory(self) -> Settings:
        """The settings, with batches that the GPU holds beside all that will be kept there."""

        def run(inputs: list[ModelInput]) -> None:
            with device_errors(self.device):
                kept = torch.empty(self.forward.language.max_prefix_bytes, dtype=torch.uint8, device=self.device)
            self._launch(inputs)()
            del kept

        budget = find_budget(self.preprocessor, run)
        return self.settings.model_copy(update={"max_batch_tokens": budget})

    def _record_graphs(self) -> TextGraphs:
        try:
            with device_errors(self.device):
                return TextGraphs(self.forward.language, self.device)
        except DeviceOutOfMemory as error:
            raise ModelUnavailable(f"EMBEDDER_CUDA_GRAPHS: no memory is left for the graphs: {error}") from error

    def _compile(self) -> None:
        """Run each tower once. Raises `ModelUnavailable` where what torch.compile needs is missing."""
        logger.info("compiling the layers; TORCHINDUCTOR_CACHE_DIR says where that is kept for the next start")
        start = time.monotonic()
        item = EmbeddingItem((Text("ready?"), Image(EXAMPLE_IMAGE)))
        try:
            self.forward(pack([self.preprocessor(item)], self.preprocessor.vision.merge_size, self.device))
        except RuntimeError as error:
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())
            raise ModelUnavailable(f"EMBEDDER_TORCH_COMPILE: the layers cannot be compiled: {reason}") from error
        logger.info("compiled in %.0f s", time.monotonic() - start)

    def _launch(self, inputs: list[ModelInput]) -> WaitForRows:
        order = sorted(range(len(inputs)), key=lambda index: inputs[index].num_tokens)
        with device_errors(self.device):
            wait_for_rows = pool(self._forward([inputs[index] for index in order]))

        def wait() -> NDArray[np.float32]:
            with device_errors(self.device):
                return wait_for_rows()[np.argsort(order)]

        return wait

    def _forward(self, inputs: list[ModelInput]) -> torch.Tensor:
        """(num_items, hidden_size), on the device."""
        if self.graphs and (num_tokens := graph_size(inputs)):
            return self.graphs(inputs, num_tokens)
        return self.forward(pack(inputs, self.preprocessor.vision.merge_size, self.device))

    def _announce(self, seconds: float) -> None:
        if self.checkpoint.is_bundled:
            logger.warning(
                "serving the small model shipped in the package: it knows colors, shapes and emoji drawings, "
                "and is for trying out. Set EMBEDDER_MODEL=Qwen/Qwen3-VL-Embedding-2B for the real one"
            )
        logger.info(
            "%s loaded in %.1f s: %s, %s, attention %s",
            self.checkpoint.name,
            seconds,
            self.device,
            self.forward.dtype,
            self.forward.attention_name,
        )


def _to_item(item: Item, instruction: str | None, dimensions: int | None) -> EmbeddingItem:
    match item:
        case EmbeddingItem():
            return item
        case str():
            return EmbeddingItem((Text(item),), instruction, dimensions)
        case PIL.Image.Image():
            return EmbeddingItem((Image(item),), instruction, dimensions)
        case Mapping():
            return item_from_fields({"instruction": instruction, "dimensions": dimensions, **item})
    raise InvalidRequest(f"got {type(item).__name__}; allowed: a text, a PIL image, a mapping or an EmbeddingItem")


def _choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
