"""Qwen3-VL-Embedding: text, images, clips and mixtures of them in, one vector each out.

    from embedder import Embedder

    with Embedder("Qwen/Qwen3-VL-Embedding-2B") as embedder:
        red, swatch = embedder.embed(["red", {"image": open("red.png", "rb").read()}])

The path of an item, one file a step, in order; a step imports only what stands above it:

    settings, errors    what an operator may choose; what can go wrong
    request             JSON or Python values -> EmbeddingItems
    address             a URL -> where it leads, if the operator allows it
    fetch               an item's URLs -> the bytes behind them
    media               an item's pictures -> RGB values, resized, within limits
    video               an item's clips -> sampled frames and their times, likewise
    prompt              instruction and parts -> the chat text the model was trained on
    preprocess          text and pixels -> ModelInput: token ids, positions, patches, cost
    cache               content that was embedded before -> its row, if that is wanted
    scheduler           waiting ModelInputs -> which go next, under the token budget
    packing             those -> PackedBatch on the device, one row without padding
    model/              PackedBatch -> the last token's hidden state of each item
    pooling             hidden states -> float32 rows on the host
    postprocess         row -> cut to `dimensions`, unit length
    response            vectors -> JSON

Around it: `checkpoint` finds the model's folder; `engine` owns the queue and the threads; `library` puts a real
checkpoint behind the engine (`Embedder`), and `budget` finds what fits its device at once; `awaiting` puts items
through it from an event loop. `native` (`/embed`), `openai` (`/v1`) and `cohere` (`/v2`) translate what those clients
send into the same items, with `chat` for the forms they share; `openapi` describes the HTTP contract, `edge` guards it,
with the callers' `keys` and with `values` to count what a body holds, behind each `connection` with its bounds; `log`
names the request in every line and keeps its body out; `lifecycle` starts and stops all that. `observer` is what the
engine tells of its work, which `metrics` counts for Prometheus and `tracing` draws as spans. `playground` is the page
to look at, and the pictures that it searches. `bulk` embeds whole data sets on Ray. `verify` checks a checkpoint or a
running service from outside; `random_checkpoint` writes checkpoints for tests and benchmarks; `torchvision_shim` lets
torchvision load beside a CPU build of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedder.embedder import Embedder as Embedder

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    """`Embedder` is imported when it is first asked for: torch and transformers cost seconds."""
    if name == "Embedder":
        from embedder.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
