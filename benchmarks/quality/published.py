"""Published scores in percent, for comparison.

Source: the technical report and the model cards of Qwen3-VL-Embedding. The score of a benchmark is the mean of the main
scores of its tasks. mteb contains MMTEB as "MTEB(Multilingual, v2)". It does not contain MMEB-V2, so these rows show no
result of this project.
"""

from __future__ import annotations

MMTEB = "MTEB(Multilingual, v2)"

PUBLISHED: dict[str, dict[str, float]] = {
    "Qwen/Qwen3-VL-Embedding-2B": {
        MMTEB: 63.9,
        "MMEB-V2 image": 75.0,
        "MMEB-V2 video": 61.9,
        "MMEB-V2 visual documents": 79.2,
        "MMEB-V2 all": 73.2,
    },
    "Qwen/Qwen3-VL-Embedding-8B": {
        MMTEB: 67.9,
        "MMEB-V2 image": 80.1,
        "MMEB-V2 video": 67.1,
        "MMEB-V2 visual documents": 82.4,
        "MMEB-V2 all": 77.8,
    },
}


def published_of(name: str) -> dict[str, float]:
    """The scores of a model by hub id or folder name; empty for other models."""
    return next((figures for hub_id, figures in PUBLISHED.items() if name in (hub_id, hub_id.split("/")[1])), {})
