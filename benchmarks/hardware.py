"""Which model fits which GPU, and at what rate, computed from the shapes: a table of docs/operations/sizing.md.

Memory is what docs/operations/sizing.md adds up. A rate is `USED` of what the data sheet's arithmetic allows for a full
batch (`gpu_counts`), or what reading the weights once per batch allows, if that is less.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import report

USED = 0.5  # of the data sheet's FLOP/s, an assumption until a GPU is measured
MEMORY_GB = {"2b": 7, "8b": 20}  # weights, prefixes, activations and libraries
WEIGHTS_GB = {"2b": 4.3, "8b": 16.3}
MEASURED: frozenset[str] = frozenset()  # names of GPUs with a record of `benchmarks.gpu`


@dataclass(frozen=True)
class Gpu:
    """From the data sheet: dense FLOP/s in 16 bits, in units of 10^12, and the memory's rate."""

    name: str
    memory_gb: int
    tflops: float
    gb_per_s: float


GPUS = (
    Gpu("T4 (float16, sdpa)", 16, 65, 320),
    Gpu("L4", 24, 121, 300),
    Gpu("A10", 24, 125, 600),
    Gpu("L40S", 48, 362, 864),
    Gpu("A100 80 GB", 80, 312, 2039),
    Gpu("H100 SXM", 80, 989, 3350),
    Gpu("H200", 141, 989, 4800),
)


def table(counts: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown. `counts`: by shape and batch, as `gpu_counts` records them."""
    headers = ("GPU", "memory", "2B: texts/s", "2B: pictures/s", "8B: texts/s", "8B: pictures/s", "measured")
    rows = [
        (
            gpu.name,
            f"{gpu.memory_gb} GB",
            *(
                _rate(gpu, shape, counts[shape][batch]) if gpu.memory_gb >= MEMORY_GB[shape] else "does not fit"
                for shape in ("2b", "8b")
                for batch in ("text-64", "image-448")
            ),
            "yes" if gpu.name in MEASURED else "no",
        )
        for gpu in GPUS
    ]
    return report.table(headers, rows)


def _rate(gpu: Gpu, shape: str, batch: dict[str, float]) -> str:
    computing_s = batch["tflop"] / (gpu.tflops * USED)
    reading_s = WEIGHTS_GB[shape] / gpu.gb_per_s
    rate = batch["items"] / max(computing_s, reading_s)
    return f"{float(f'{rate:.2g}'):,.0f}"
