"""`Embedder`: the engine with a loaded checkpoint, for Python programs and for the service."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, Self, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from embedder.engine.device import WaitForRows
from embedder.engine.engine import Engine
from embedder.engine.observer import Observer
from embedder.engine.postprocess import Embedding
from embedder.errors import (
    ITEM_ERRORS,
    DeviceOutOfMemory,
    EmbedderError,
    InvalidRequest,
    ModelUnavailable,
    attributed_to_item,
)
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, Text
from embedder.inputs.preprocess import ModelInput, Preprocessor, load_tokenizer, read_vision_config
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.inputs.python_items import PythonItem, is_single_item, item_from_python
from embedder.model.checkpoint import find_checkpoint
from embedder.model.cuda_graphs import TextGraphs, graph_size
from embedder.model.device_errors import device_errors
from embedder.model.execution import choose_execution
from embedder.model.forward import Forward
from embedder.model.memory_budget import find_budget
from embedder.model.packing import pack
from embedder.model.pooling import pool
from embedder.model.products import arrange_products
from embedder.model.weights import choose_device, load_model, visual_cost
from embedder.settings import Settings, available_cores

logger = logging.getLogger(__name__)

LIMITS = (  # settings that `info` reports
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

STUCK_AFTER_S = 300.0  # default on a GPU; no batch takes a tenth of that


class Embedder:
    """A loaded checkpoint that embeds text, images, videos and mixtures of them.

    `model`: a checkpoint folder or hub id; empty: the small model shipped in the package. `device`: auto, cpu, cuda or
    cuda:N. `options`: other fields of `Settings`, by name; `settings` replaces all of these arguments. `worker`: this
    process's number, from 0, which chooses its GPU if there are several. `observer` is called at each stage of an item.
    `on_failure` is called with the reason if the device fails; then this process can embed nothing more.

    Close it, or use it in a `with` block, to end its threads. Raises `ModelUnavailable`, and pydantic's
    `ValidationError` for settings out of range.
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
        is_cuda = self.device.type == "cuda"
        self.execution = choose_execution(self.settings.execution, self.device)
        if not is_cuda:
            self._limit_torch_threads()
        # In a thread that ends afterwards: OpenMP keeps a team of threads for each thread that has computed. With this
        # thread's team in addition to the device thread's there are more threads than cores, and a text query takes
        # 6.4 ms instead of 3 (`python -m training.evaluate`, 2 cores, 2026-11-25).
        with ThreadPoolExecutor(1) as loader:
            loader.submit(self._load).result()
        self.engine = Engine(
            self.preprocessor,
            self._launch,
            self.forward.hidden_size,
            self._limit_batches_to_memory() if is_cuda else self.settings,
            observer=observer,
            max_in_flight=2 if is_cuda else 1,
            stuck_after_s=self.settings.stuck_after_s or (STUCK_AFTER_S if is_cuda else math.inf),
            on_failure=on_failure,
        )
        self._log_start(time.monotonic() - start)

    @overload
    def embed(
        self,
        items: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        errors: Literal["raise"] = "raise",
        show_progress_bar: bool = False,
    ) -> list[NDArray[np.float32]]: ...

    @overload
    def embed(
        self,
        items: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        errors: Literal["return"],
        show_progress_bar: bool = False,
    ) -> list[NDArray[np.float32] | EmbedderError]: ...

    def embed(
        self,
        items: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        errors: Literal["raise", "return"] = "raise",
        show_progress_bar: bool = False,
    ) -> list[Any]:
        """Embed items: one vector per item, in order, each (dimensions,) float32.

        An item is a string, a `Path` to an image or video, a PIL image, an array (height, width, 3) uint8, an
        `EmbeddingItem`, or a mapping with `text`, `image` (one of the above, encoded bytes, base64, or a URL if
        `url_hosts` allows it), `video` (likewise, or a list of frames) or `content` (a list of parts in your order),
        and optionally `instruction`, `dimensions`, `normalize` and `truncate`. `instruction` and `dimensions` of this
        call apply to items that do not set their own. `dimensions` is from 64 to the model's hidden size, the default.
        Vectors have unit length, except with `normalize` false.

        Blocks while the queue is full, so a generator is read only as fast as its items are embedded. Raises the
        `EmbedderError` of the first item that fails, with its index; the items after it are cancelled. With `errors`
        "return", the result has the error in the place of the vector, and all other items are embedded.
        """
        if is_single_item(items):
            raise InvalidRequest(f"got a single {type(items).__name__}; allowed: a list of items, as in embed([item])")
        total = len(items) if isinstance(items, Sized) else None
        results: list[NDArray[np.float32] | EmbedderError] = []
        futures: deque[Future[Embedding]] = deque()  # of the items that follow those in `results`
        request = object()

        def take_first(progress: tqdm) -> None:
            try:
                with attributed_to_item(len(results)):
                    results.append(futures[0].result().vector)
            except ITEM_ERRORS as error:
                if errors == "raise":
                    raise
                results.append(error)
            futures.popleft()
            progress.update()

        try:
            with tqdm(total=total, unit="item", disable=not show_progress_bar) as progress:
                for index, item in enumerate(items):
                    futures.append(self._submit(item, index, instruction, dimensions, request, errors))
                    while futures and futures[0].done():
                        take_first(progress)
                while futures:
                    take_first(progress)
        finally:
            for future in futures:
                future.cancel()  # after an error
        return results

    def embed_query(
        self, queries: PythonItem | Sequence[PythonItem], *, dimensions: int | None = None
    ) -> NDArray[np.float32]:
        """Embed what a user searches with, under the published instruction for queries.

        One query -> (dimensions,); a list -> (num_queries, dimensions). Otherwise as `embed`.
        """
        return self._embed_array(queries, QUERY_INSTRUCTION, dimensions)

    def embed_document(
        self, documents: PythonItem | Sequence[PythonItem], *, dimensions: int | None = None
    ) -> NDArray[np.float32]:
        """Embed what is searched, under the default instruction.

        One document -> (dimensions,); a list -> (num_documents, dimensions). Otherwise as `embed`.
        """
        return self._embed_array(documents, None, dimensions)

    def info(self) -> dict[str, Any]:
        """The model, its sizes, the device and the limits, as `/info` reports them. Pixels are per image."""
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
        """Finish the submitted items and end the threads."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(
        self,
        item: PythonItem,
        index: int,
        instruction: str | None,
        dimensions: int | None,
        request: object,
        errors: Literal["raise", "return"],
    ) -> Future[Embedding]:
        """The item's future. With `errors` "return", it also holds what makes an item invalid."""
        try:
            with attributed_to_item(index):
                return self.engine.submit(item_from_python(item, instruction, dimensions), request=request, wait=True)
        except ITEM_ERRORS as error:
            if errors == "raise":
                raise
            failed: Future[Embedding] = Future()
            failed.set_exception(error)
            return failed

    def _embed_array(
        self, items: PythonItem | Sequence[PythonItem], instruction: str | None, dimensions: int | None
    ) -> NDArray[np.float32]:
        """One item -> its vector; several -> a matrix."""
        is_single = is_single_item(items)
        rows = self.embed(
            cast("Sequence[PythonItem]", [items] if is_single else items),
            instruction=instruction,
            dimensions=dimensions,
        )
        matrix = np.stack(rows) if rows else np.empty((0, dimensions or self.forward.hidden_size), np.float32)
        return matrix[0] if is_single else matrix

    def _load(self) -> None:
        weights = load_model(self.checkpoint.folder, _choose_dtype(self.settings, self.device), self.device)
        vision = read_vision_config(self.checkpoint.folder, self.settings)
        self.preprocessor = Preprocessor(
            load_tokenizer(self.checkpoint.folder), vision, self.settings, visual_cost=visual_cost(weights)
        )
        arrange_products(weights, is_compiled=self.execution.is_compiled)
        self.forward = Forward(weights, vision, self.settings.attention, is_compiled=self.execution.is_compiled)
        if self.execution.is_compiled and not self._compile_layers():
            self.forward = Forward(weights, vision, self.settings.attention)
        self.graphs = self._record_graphs() if self.execution.has_graphs else None

    def _limit_torch_threads(self) -> None:
        """Use this worker's share of the cores. By default torch uses all of the machine's, whatever the CPU quota."""
        share = max(1, available_cores() // self.settings.num_workers(torch.cuda.device_count()))
        torch.set_num_threads(min(torch.get_num_threads(), share))

    def _limit_batches_to_memory(self) -> Settings:
        """The settings with `max_batch_tokens` lowered to what fits the GPU next to the kept prefixes."""

        def run(inputs: list[ModelInput]) -> None:
            with device_errors(self.device):
                kept = torch.empty(self.forward.language.max_prefix_bytes, dtype=torch.uint8, device=self.device)
            self._launch(inputs)()
            del kept

        budget = find_budget(self.preprocessor, run)
        return self.settings.model_copy(update={"max_batch_tokens": budget})

    def _record_graphs(self) -> TextGraphs | None:
        """The graphs. None if there is no memory for them and they are not required."""
        try:
            with device_errors(self.device):
                return TextGraphs(self.forward.language, self.device)
        except DeviceOutOfMemory as error:
            self._do_without(f"no memory is left for the graphs: {error}", has_graphs=False)
            return None

    def _compile_layers(self) -> bool:
        """Run each tower once. False if torch.compile does not work here and is not required."""
        logger.info("compiling the layers; the next start is faster if TORCHINDUCTOR_CACHE_DIR keeps the result")
        start = time.monotonic()
        item = EmbeddingItem((Text("ready?"), Image(EXAMPLE_IMAGE)))
        try:
            self.forward(pack([self.preprocessor(item)], self.preprocessor.vision.merge_size, self.device))
        except RuntimeError as error:
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())
            self._do_without(f"the layers cannot be compiled: {reason}", is_compiled=False)
            return False
        logger.info("the layers are compiled after %.0f s", time.monotonic() - start)
        return True

    def _do_without(self, reason: str, **changes: bool) -> None:
        """Go on without a part of the execution, with a line in the log. Raises `ModelUnavailable` if required."""
        if self.execution.is_required:
            raise ModelUnavailable(f"EMBEDDER_EXECUTION={self.settings.execution}: {reason}")
        logger.warning("%s; the service works, but short texts take longer", reason)
        self.execution = replace(self.execution, reason=reason, **changes)

    def _launch(self, inputs: list[ModelInput]) -> WaitForRows:
        """Start a batch, sorted by length; the function returned gives the rows in the order of `inputs`."""
        order = sorted(range(len(inputs)), key=lambda index: inputs[index].num_tokens)
        with device_errors(self.device):
            wait_for_rows = pool(self._forward([inputs[index] for index in order]))

        def wait() -> NDArray[np.float32]:
            with device_errors(self.device):
                return wait_for_rows()[np.argsort(order)]

        return wait

    def _forward(self, inputs: list[ModelInput]) -> torch.Tensor:
        """The final hidden states, (num_items, hidden_size), on the device."""
        if self.graphs and (num_tokens := graph_size(inputs)):
            return self.graphs(inputs, num_tokens)
        return self.forward(pack(inputs, self.preprocessor.vision.merge_size, self.device))

    def _log_start(self, seconds: float) -> None:
        if self.checkpoint.is_bundled:
            logger.warning(
                "using the small model shipped in the package, for trials only: it knows colors, shapes and emoji. "
                "Set EMBEDDER_MODEL=Qwen/Qwen3-VL-Embedding-2B to use the published model"
            )
        logger.info(
            "%s loaded in %.1f s: device %s, dtype %s, attention %s, layers %s",
            self.checkpoint.name,
            seconds,
            self.device,
            self.forward.dtype,
            self.forward.attention_name,
            self.execution,
        )


def _choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
