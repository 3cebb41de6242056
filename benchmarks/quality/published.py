"""Figures that others published, in percent, to lay beside ours.

Source: the technical report and model cards of Qwen3-VL-Embedding. A benchmark's figure is the mean of its tasks' main
scores. mteb has MMTEB, as "MTEB(Multilingual, v2)"; it does not have MMEB-V2, so those rows stay without ours.
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
    """Those of a model, by hub id or by the name of a folder that holds it; empty for others."""
    return next((figures for hub_id, figures in PUBLISHED.items() if name in (hub_id, hub_id.split("/")[1])), {})
