"""Let `import torchvision` succeed next to a CPU build of torch.

torchvision's wheel on PyPI is linked for CUDA. Next to a CPU build of torch its compiled part does not load, and the
import stops at `operator torchvision::nms does not exist`, although nothing used here (processors, transforms,
qwen-vl-utils) calls that operator. Declaring the schemas of two operators first lets the import succeed. Call this
before the first import of torchvision, of transformers' models and processors, or of qwen-vl-utils.
"""

import importlib.util
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # a library's operators vanish with the object


def declare_torchvision_operators() -> None:
    """Declare the operators of torchvision's compiled part if that part does not load here."""
    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")  # type: ignore[no-untyped-call]  # torch leaves these three untyped
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _declared.append(library)
