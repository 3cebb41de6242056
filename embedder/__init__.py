"""Qwen3-VL-Embedding: text, images, videos and mixtures of them in, one vector per item out.

    from embedder import Embedder

    with Embedder("Qwen/Qwen3-VL-Embedding-2B") as embedder:
        red, swatch = embedder.embed(["red", {"image": open("red.png", "rb").read()}])

An item goes through these folders, top to bottom:

    http/           a request body -> items; embeddings -> a response body
    engine/         which items run together, on which thread, and for how long
    inputs/         untrusted text, images, videos and URLs -> token ids and patches
    model/          token ids and patches -> hidden states, on the device

Of these, `http` imports `engine` and `inputs`; `engine` and `model` import only `inputs`; `inputs` imports none.

Next to them: `models` connects the loaded models (`loaded_model`) with an engine; `embedder` and `reranker` are the
same for Python programs; `settings` reads the environment; `errors` defines everything that can go wrong;
`torchvision_shim` lets torchvision be imported next to a CPU build of torch; `doctor` is a command that checks what a
start needs. `server/` holds what depends on BentoML's and uvicorn's internals, `telemetry/` metrics, spans and logs,
`documents/` turns files into pages, `bulk/` is the command for whole data sets, `search/` the command that searches
what `bulk` has embedded, `playground/` the web page, `verify/` the command that checks a checkpoint or a running
service. `default_model/`, `default_reranker/` and `demo/` are small trained models and images.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedder.embedder import Embedder as Embedder
    from embedder.reranker import Reranker as Reranker

# OpenMP's threads spin while they wait. Next to other busy processes that makes torch 10 to 30 times slower on a CPU: a
# text query took 516 ms at the median instead of 28, bulk embedded 11 texts a second instead of 191 (two busy loops on
# two cores, `python -m benchmarks.busy`). Set before torch loads OpenMP, unless the user has chosen a policy.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

# Batches have many sizes, and each would leave blocks of its own size in torch's cache of a GPU's memory. Segments that
# grow hold all sizes. Not measured: this project has not been run on a GPU yet.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

__version__ = "0.2.0"
__all__ = ["Embedder", "Reranker", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Embedder` and `Reranker` on first use, because importing torch takes seconds."""
    if name == "Embedder":
        from embedder.embedder import Embedder

        return Embedder
    if name == "Reranker":
        from embedder.reranker import Reranker

        return Reranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
