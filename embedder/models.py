"""The models that a process serves, on one device and with one engine: an embedding model, a reranker, or both."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedder.engine.aio import embed_all, score_each
from embedder.engine.device import Rows, WaitForRows
from embedder.engine.engine import Engine
from embedder.engine.observer import Observer
from embedder.engine.scheduler import ON_CPU, ON_GPU
from embedder.errors import EmbedderError
from embedder.inputs.decoder import Decoder
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, Text
from embedder.inputs.pairs import Pair, Query
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.loaded_model import EmbeddingModel, RerankingModel
from embedder.model.checkpoint import find_checkpoint, find_reranker
from embedder.model.devices import check_device, choose_device, unused_driver
from embedder.model.memory import release_freed_memory
from embedder.model.speed import warn_if_slow
from embedder.model.vision_cache import VisionCache
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
    "max_document_pages",
    "max_queued_tokens",
    "url_hosts",
    "url_timeout_s",
    "decode_timeout_s",
    "request_timeout_s",
)

STUCK_AFTER_S = 300.0  # default on a GPU; no batch takes a tenth of that


class Models:
    """The models that `settings` name, and the engine that all their items go through.

    `embedder` is None if the settings name only a reranker, and `reranker` if they name none. `worker`: this process's
    number, from 0, which chooses its GPU if there are several. `observer` is called at each stage of an item.
    `on_failure` is called with the reason if the device fails; then this process can compute nothing more.

    Raises `ModelUnavailable`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        worker: int = 0,
        observer: Observer | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self.embedder: EmbeddingModel | None = None
        self.reranker: RerankingModel | None = None
        self.device = choose_device(settings, worker)
        check_device(self.device)
        if driver := unused_driver(settings, self.device):
            logger.warning(
                "this machine has a GPU's driver (%s), but torch %s finds no GPU, so the model runs on the CPU. "
                "Install a torch for this GPU, or set EMBEDDER_DEVICE=cpu if that is intended",
                driver,
                torch.__version__,
            )
        observer = observer or Observer()
        is_gpu = self.device.type in ("cuda", "xpu")  # Apple's shares the machine's memory, and may take minutes
        if self.device.type == "cpu":
            self._limit_torch_threads()
        # In a thread that ends afterwards: OpenMP keeps a team of threads for each thread that has computed. With this
        # thread's team in addition to the device thread's there are more threads than cores, and a text query takes
        # 6.4 ms instead of 3 (`python -m training.evaluate`, 2 cores, 2026-11-25).
        with ThreadPoolExecutor(1) as loader:
            loader.submit(self._load).result()
        self.engine = Engine(
            self._preprocess,
            self._launch,
            self._first.forward.hidden_size,
            self._limit_batches_to_memory() if is_gpu else settings,
            observer=observer,
            max_in_flight=2 if self.device.type == "cuda" else 1,
            batch_length=ON_GPU if is_gpu else ON_CPU,
            stuck_after_s=settings.stuck_after_s or (STUCK_AFTER_S if is_gpu else math.inf),
            on_failure=on_failure,
        )
        self._add_vision_cache(observer)
        if self.device.type == "cpu":  # a launch computes there, for seconds or minutes: drop what nobody waits for
            for model in self._loaded:
                model.forward.call_between_layers(self.engine.stop_if_abandoned)

    def info(self) -> dict[str, Any]:
        """The models, their sizes, the device and the limits, as `/info` reports them.

        The fields are those of the embedding model, or of the reranker if it is the only model; with both, those of the
        reranker are in `reranker`.
        """
        both = {"reranker": self.reranker.info()} if self.embedder and self.reranker else {}
        roles = [name for name in ("embedder", "reranker") if getattr(self, name)]
        limits = {name: getattr(self.settings, name) for name in LIMITS}
        limits["max_video_frames"] = self._first.preprocessor.vision.regime.max_frames
        return {**self._first.info(), "roles": roles, **both, "limits": limits}

    async def warm_up(self) -> None:
        """Compute a text and an image with each model. Raises whatever fails."""
        items = [EmbeddingItem((Text("ready?"),)), EmbeddingItem((Image(EXAMPLE_IMAGE),))]
        if self.embedder:
            await embed_all(self.engine, items, self.settings.request_timeout_s)
        if self.reranker:
            query = Query(items[0].parts, num_documents=len(items))
            for outcome in await score_each(self.engine, query, items, self.settings.request_timeout_s):
                if isinstance(outcome, EmbedderError):
                    raise outcome

    def close(self) -> None:
        """Finish the submitted items and end the threads."""
        self.engine.close()

    @property
    def preprocessor(self) -> Preprocessor:
        """The embedding model's, or the reranker's if it is the only model."""
        return self._first.preprocessor

    @property
    def _loaded(self) -> list[EmbeddingModel]:
        return [model for model in (self.embedder, self.reranker) if model]

    @property
    def _first(self) -> EmbeddingModel:
        return self._loaded[0]

    def _load(self) -> None:
        if self.settings.has_embedder:
            self.embedder = EmbeddingModel(find_checkpoint(self.settings), self.settings, self.device)
            if self.embedder.checkpoint.is_bundled:
                _warn_of_bundled("model", "EMBEDDER_MODEL", "Embedder", "Qwen/Qwen3-VL-Embedding-2B")
        if self.settings.reranker:
            checkpoint = find_reranker(self.settings)
            self.reranker = RerankingModel(checkpoint, self.settings, self.device, self.embedder)
            if checkpoint.is_bundled:
                _warn_of_bundled("reranker", "EMBEDDER_RERANKER", "Reranker", "Qwen/Qwen3-VL-Reranker-2B")
        if self.device.type == "cpu":
            for model in self._loaded:
                warn_if_slow(model.forward, model.preprocessor)
            release_freed_memory()  # of the measured layers

    def _limit_torch_threads(self) -> None:
        """Use this worker's share of the cores. By default torch uses all of the machine's, whatever the CPU quota."""
        share = max(1, available_cores() // self.settings.num_workers(torch.cuda.device_count()))
        torch.set_num_threads(min(torch.get_num_threads(), share))

    def _limit_batches_to_memory(self) -> Settings:
        """The settings with `max_batch_tokens` lowered to what fits the GPU next to all models."""
        vision_cache_bytes = self.settings.vision_cache_bytes if self.reranker else 0
        kept_bytes = vision_cache_bytes + sum(model.forward.language.max_prefix_bytes for model in self._loaded)
        budget = min(model.find_budget(kept_bytes) for model in self._loaded)
        return self.settings.model_copy(update={"max_batch_tokens": budget})

    def _add_vision_cache(self, observer: Observer) -> None:
        """Give the reranker a vision cache, and the embedding model the same one if its vision weights are the same.

        An embedding model by itself has none: it sees most images once, and equal items are what `cache_bytes` is for.
        """
        if not self.reranker or not self.settings.vision_cache_bytes:
            return
        cache = VisionCache(self.settings.vision_cache_bytes, observer.encoded)
        self.reranker.use_vision_cache(cache)
        if self.embedder and self.embedder.has_vision_of(self.reranker):
            self.embedder.use_vision_cache(cache)

    def _preprocess(self, item: EmbeddingItem, decoder: Decoder) -> ModelInput:
        model = self.reranker if isinstance(item, Query | Pair) else self.embedder
        assert model is not None  # the routes and the library offer only what is loaded
        return model.preprocessor(item, decoder)

    def _launch(self, inputs: list[ModelInput]) -> WaitForRows:
        """Start a batch. Items and pairs share it, but each model computes its own, one after the other."""
        launched: list[tuple[list[int], WaitForRows]] = []
        for model, is_pair in ((self.embedder, False), (self.reranker, True)):
            places = [place for place, one in enumerate(inputs) if one.is_pair is is_pair]
            if places:
                assert model is not None
                if len(places) == len(inputs):
                    return model.launch(inputs)
                launched.append((places, model.launch([inputs[place] for place in places])))

        def wait() -> Rows:
            rows: dict[int, NDArray[np.float32]] = {}
            for places, wait_for_rows in launched:
                rows |= zip(places, wait_for_rows(), strict=True)
            return [rows[place] for place in range(len(inputs))]

        return wait


def _warn_of_bundled(kind: str, setting: str, library_class: str, published: str) -> None:
    logger.warning(
        "using the small %s shipped in the package, for trials only: it knows colors, shapes and emoji. "
        'To use the published one, set %s=%s, or in Python call %s("%s")',
        kind,
        setting,
        published,
        library_class,
        published,
    )
