"""The service with a model that computes nothing, to measure the rest of a request. For `bentoml serve`."""

from __future__ import annotations

from benchmarks.limits import no_model
from embedder.models import Models
from service import Qwen3VLEmbedding as Qwen3VLEmbedding

Models._launch = no_model  # type: ignore[method-assign]
