"""A checkpoint on its device: preprocesses items, and launches batches of them."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedder.engine.device import WaitForRows
from embedder.errors import DeviceOutOfMemory, ModelUnavailable
from embedder.inputs.chat_template import check_chat_template
from embedder.inputs.items import EXAMPLE_IMAGE, EmbeddingItem, Image, Text
from embedder.inputs.pairs import DEFAULT_INSTRUCTION, PairPreprocessor
from embedder.inputs.preprocess import ModelInput, Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model.attention import choose_attention, log_attention
from embedder.model.checkpoint import Checkpoint
from embedder.model.cuda_graphs import TextGraphs, graph_size
from embedder.model.device_errors import device_errors
from embedder.model.devices import choose_dtype
from embedder.model.eight_bit import check_weight_format
from embedder.model.execution import choose_execution
from embedder.model.forward import Forward
from embedder.model.halves import can_share_threads, compute_both, split
from embedder.model.memory import keep_freed_memory, release_freed_memory
from embedder.model.memory_budget import find_budget
from embedder.model.packing import MAX_SHARED_TOKENS, PackedBatch, pack
from embedder.model.pooling import pool
from embedder.model.products import arrange_products
from embedder.model.score_head import load_score_head
from embedder.model.vision_cache import VisionCache
from embedder.model.weights import (
    check_vocabulary,
    load_model,
    num_language_weights,
    vision_digest,
    visual_cost,
)
from embedder.settings import Settings

logger = logging.getLogger(__name__)

# The most keys of all pairs in one forward pass, unless `max_batch_tokens` is larger. Each layer copies these keys and
# their values: 0.25 GB with the 2B in bfloat16.
MIN_KEYS = 2**16

# torch's errors are RuntimeErrors. Triton builds a library at the first launch of a kernel, and passes on the errors of
# the C compiler, of the cache's folder, and of a library that cannot be loaded, as on a disk mounted without exec.
NOT_COMPILED = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)


class EmbeddingModel:
    """A checkpoint that gives one row for each item: the final hidden state of its last token."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, device: torch.device) -> None:
        start = time.monotonic()
        self.checkpoint = checkpoint
        self.settings = settings
        self.device = device
        dtype = choose_dtype(settings, device, is_bundled=checkpoint.is_bundled)
        check_weight_format(settings.weights, device, dtype)
        self.attention, _ = choose_attention(settings.attention, device, dtype)
        self.execution = choose_execution(settings.execution, device, self.attention)
        log_attention(self.attention, device)
        weights = load_model(checkpoint.folder, dtype, device, settings.weights)
        self.num_language_weights = num_language_weights(weights)
        self.max_shared_tokens = self._max_shared_tokens()
        self.preprocessor = self._make_preprocessor(weights)
        self.vision_digest = vision_digest(weights) if _may_share_vision(settings) else b""
        arrange_products(weights, is_compiled=self.execution.is_compiled)
        if settings.weights:
            release_freed_memory()  # of the parts of joined layers: 0.4 GB for the 2B
        if device.type == "cpu":
            keep_freed_memory()
        self.forward = self._make_forward(weights)
        if self.execution.is_compiled and not self._compile_layers():
            self.forward = self._make_forward(weights)
        self.graphs = self._record_graphs() if self.execution.has_graphs else None
        logger.info(
            "%s loaded in %.1f s: device %s, dtype %s, weights %s, attention %s, layers %s",
            checkpoint.name,
            time.monotonic() - start,
            device,
            self.forward.dtype,
            self.weight_format,
            self.attention,
            self.execution,
        )

    def launch(self, inputs: list[ModelInput]) -> WaitForRows:
        """Start a batch, sorted by length; the function returned gives the rows in the order of `inputs`."""
        order = sorted(range(len(inputs)), key=lambda index: inputs[index].num_tokens)
        with device_errors(self.device):
            wait_for_rows = pool(self._rows([inputs[index] for index in order]))

        def wait() -> NDArray[np.float32]:
            with device_errors(self.device):
                return wait_for_rows()[np.argsort(order)]

        return wait

    def use_vision_cache(self, cache: VisionCache) -> None:
        """Reuse the features of images and clips that occur again."""
        self.forward.vision_cache = cache
        self.preprocessor.hashes_media = True

    def has_vision_of(self, other: EmbeddingModel) -> bool:
        """Whether both models compute the same features of the same patches."""
        ours, theirs = self.preprocessor.vision, other.preprocessor.vision
        return (self.vision_digest, ours.mean, ours.std) == (other.vision_digest, theirs.mean, theirs.std)

    def find_budget(self, kept_bytes: int) -> int:
        """`max_batch_tokens`, or as much of it as fits the GPU next to `kept_bytes`.

        Call it before the model has a vision cache, which would not compute equal images again.
        """

        def run(inputs: list[ModelInput]) -> None:
            with device_errors(self.device):
                kept = torch.empty(kept_bytes, dtype=torch.uint8, device=self.device)
            self.launch(inputs)()
            del kept

        return find_budget(self.preprocessor, run)

    def info(self) -> dict[str, Any]:
        """The model, its sizes and its device, as `/info` reports them. Pixels are per image."""
        vision = self.preprocessor.vision
        return {
            "model": self.checkpoint.name,
            "revision": self.checkpoint.revision,
            "is_bundled_model": self.checkpoint.is_bundled,
            "hidden_size": self.forward.hidden_size,
            "default_instruction": self.default_instruction,
            "preprocessing": vision.regime.name,
            "raw_orientation": self.settings.raw_orientation,
            "pixels": {
                "min": vision.regime.min_pixels,
                "max": vision.regime.max_pixels,
                "multiple_of": vision.factor,
            },
            "device": str(self.device),
            "dtype": str(self.forward.dtype).removeprefix("torch."),
            "weights": self.weight_format,
            "attention": self.attention,
        }

    @property
    def weight_format(self) -> str:
        """int8 or fp8, or the data type of the model if the layers' weights are not in 8 bits."""
        return self.settings.weights or str(self.forward.dtype).removeprefix("torch.")

    @property
    def default_instruction(self) -> str:
        """The instruction of items that have none."""
        return self.settings.default_instruction

    def _max_shared_tokens(self) -> int:
        return MAX_SHARED_TOKENS

    def _make_preprocessor(self, weights: Any) -> Preprocessor:
        folder = self.checkpoint.folder
        vision = read_vision_config(folder, self.settings)
        return Preprocessor(self._load_tokenizer(), vision, self.settings, visual_cost=visual_cost(weights))

    def _load_tokenizer(self) -> Tokenizer:
        check_chat_template(self.checkpoint.folder)
        tokenizer = load_tokenizer(self.checkpoint.folder)
        check_vocabulary(self.checkpoint.folder, tokenizer)
        return tokenizer

    def _rows(self, inputs: list[ModelInput]) -> torch.Tensor:
        """The final hidden states, (num_items, hidden_size), on the device."""
        if self.graphs and (num_tokens := graph_size(inputs)):
            return self.graphs(inputs, num_tokens)
        halves = self._halves(inputs)
        if halves is None:
            return self.forward(self._pack(inputs))
        batches = [self._pack([inputs[index] for index in half]) for half in halves]
        # before the halves: the cache of prefixes is for one thread, too
        first, second = (partial(self.forward, batch, self.forward.prefixes(batch)) for batch in batches)
        return torch.cat(compute_both(first, second))[np.argsort(halves[0] + halves[1])]

    def _halves(self, inputs: list[ModelInput]) -> tuple[list[int], list[int]] | None:
        """The places of the items that are computed at the same time as the others; None if all run together."""
        if self.device.type != "cpu" or self.settings.weights or self.execution.is_compiled:
            return None  # weights of 8 bits are converted in shared memory; compiled layers keep all threads
        if self.forward.vision_cache.max_bytes and any(one.patches for one in inputs):
            return None  # the cache is for one thread, and computes equal images of a batch once
        if not can_share_threads():
            return None
        # a pair's cost does not have the query's tokens, which its prefix is
        return split([one.cost if one.is_pair else one.cost - one.num_prefix_tokens for one in inputs])

    def _pack(self, inputs: list[ModelInput]) -> PackedBatch:
        merge_size, find_features = self.preprocessor.vision.merge_size, self.forward.vision_cache.find
        return pack(inputs, merge_size, self.device, self.max_shared_tokens, find_features)

    def _make_forward(self, weights: Any) -> Forward:
        return Forward(
            weights,
            self.preprocessor.vision,
            self.attention,
            is_compiled=self.execution.is_compiled,
            max_shared_tokens=self.max_shared_tokens,
        )

    def _record_graphs(self) -> TextGraphs | None:
        """The graphs. None if they cannot be recorded here and are not required."""
        try:
            with device_errors(self.device):
                return TextGraphs(self.forward.language, self.device)
        except DeviceOutOfMemory as error:
            self._do_without(f"no memory is left for the graphs: {error}", has_graphs=False)
        except RuntimeError as error:
            self._do_without(f"the graphs cannot be recorded: {_first_paragraph(error)}", has_graphs=False)
        return None

    def _compile_layers(self) -> bool:
        """Run each tower once. False if torch.compile does not work here and is not required."""
        logger.info("compiling the layers; the next start is faster if TORCHINDUCTOR_CACHE_DIR keeps the result")
        start = time.monotonic()
        item = EmbeddingItem((Text("ready?"), Image(EXAMPLE_IMAGE)))
        try:
            with device_errors(self.device):
                self.forward(pack([self.preprocessor(item)], self.preprocessor.vision.merge_size, self.device))
        except NOT_COMPILED as error:
            self._do_without(f"the layers cannot be compiled: {_first_paragraph(error)}", is_compiled=False)
            return False
        logger.info("compiled the layers in %.0f s", time.monotonic() - start)
        return True

    def _do_without(self, reason: str, **changes: bool) -> None:
        """Go on without a part of the execution, with a line in the log. Raises `ModelUnavailable` if required."""
        if self.execution.is_required:
            raise ModelUnavailable(f"EMBEDDER_EXECUTION={self.settings.execution}: {reason}")
        logger.warning("%s; the service works, but short texts take longer", reason)
        self.execution = replace(self.execution, reason=reason, **changes)


def _first_paragraph(error: Exception) -> str:
    return " ".join(str(error).strip().partition("\n\n")[0].split())


def _may_share_vision(settings: Settings) -> bool:
    """Whether two models are served whose vision weights may be the same."""
    return bool(settings.reranker and settings.has_embedder and settings.vision_cache_bytes)


class RerankingModel(EmbeddingModel):
    """A checkpoint that gives one row of one value for each pair: the log-odds that the document answers the query.

    `relative_to`: the embedding model of the same process, in whose tokens costs are counted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        device: torch.device,
        relative_to: EmbeddingModel | None = None,
    ) -> None:
        self._relative_to = relative_to
        super().__init__(checkpoint, settings, device)

    @property
    def default_instruction(self) -> str:
        """The instruction of requests that have none: the reference's."""
        return DEFAULT_INSTRUCTION

    def info(self) -> dict[str, Any]:
        """As for an embedding model, and the vision cache."""
        cache, other = self.forward.vision_cache, self._relative_to
        is_shared = other is not None and other.forward.vision_cache is cache
        return {**super().info(), "vision_cache": {"max_bytes": cache.max_bytes, "is_shared_with_embedder": is_shared}}

    def _max_shared_tokens(self) -> int:
        return self.settings.max_input_tokens  # the longest query

    def _make_preprocessor(self, weights: Any) -> Preprocessor:
        folder = self.checkpoint.folder
        tokenizer = self._load_tokenizer()
        self._score_head = load_score_head(folder, weights, tokenizer)
        return PairPreprocessor(
            tokenizer,
            read_vision_config(folder, self.settings),
            self.settings,
            visual_cost=visual_cost(weights),
            relative_cost=self.num_language_weights / self._relative_to.num_language_weights
            if self._relative_to
            else 1.0,
        )

    @torch.inference_mode()
    def _rows(self, inputs: list[ModelInput]) -> torch.Tensor:
        """The log-odds, (num_items, 1) float32, on the device."""
        max_keys = max(MIN_KEYS, self.settings.max_batch_tokens)
        compute = super()._rows
        states = torch.cat([compute(part) for part in parts_by_keys(inputs, max_keys)])
        return (states.float() * self._score_head).sum(1, keepdim=True)


def parts_by_keys(inputs: Sequence[ModelInput], max_keys: int) -> Iterator[list[ModelInput]]:
    """Consecutive items, with at most `max_keys` keys together or one item by itself.

    Each layer copies the keys and values of the query for each of its pairs, though it computes them once.
    """
    part: list[ModelInput] = []
    num_keys = 0
    for one in inputs:
        if part and num_keys + one.num_tokens > max_keys:
            yield part
            part, num_keys = [], 0
        part.append(one)
        num_keys += one.num_tokens
    yield part
