"""Benchmarks of speed and quality, with peers on the same weights. Each command prints a table and writes results/.

    python -m benchmarks.library        the library compared with transformers and sentence-transformers
    python -m benchmarks.server         the service compared with other servers and with a bare HTTP app
    python -m benchmarks.growth         time per item and memory from 1,000 to 100,000 items
    python -m benchmarks.preprocessing  JPEG preprocessing on one core, compared with Pillow
    python -m benchmarks.choices        the effect of single design decisions
    python -m benchmarks.callers        short texts while another caller floods the service
    python -m benchmarks.overload       responses at twice the capacity
    python -m benchmarks.busy           a CPU that other processes use too
    python -m benchmarks.guard          this tree compared with an earlier commit
    python -m benchmarks.soak           100,000 mixed requests, each compared with its known result
    python -m benchmarks.bulk           20,000 rows with Ray Data, killed halfway and resumed
    python -m benchmarks.page_rendering the share of rendering when pages are embedded
    python -m benchmarks.gpu            everything that needs a GPU, within 10 minutes
    python -m benchmarks.gpu_counts     kernels, copies and FLOPs of a forward pass on a GPU, counted without one
    python -m benchmarks.output_types   recall with smaller output types
    python -m benchmarks.quality        mteb, color names, ablations

Modules: `checkpoints` and `workloads` create weights and items; `peers` are the libraries, `contenders` and `apps/` the
servers; `compare` runs libraries in turns, `load` sends requests to servers; `limits`, `meter` and `gaps` measure the
machine and a process; `report` writes results. Times vary on a shared machine; compare the ratios.
"""

import embedder  # noqa: F401 - before torch, whose OpenMP reads the wait policy that it sets
