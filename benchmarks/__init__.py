"""Speed against peers on the same weights in the same run, and quality: each command prints a table, writes results/.

    python -m benchmarks.library        the library against transformers and sentence-transformers
    python -m benchmarks.server         the service against other servers, and against the limits of HTTP
    python -m benchmarks.growth         1 k to 100 k items: time per item and memory
    python -m benchmarks.preprocessing  what one core makes of JPEGs, against Pillow alone
    python -m benchmarks.overload       twice what the service can do, for minutes
    python -m benchmarks.soak           100 k mixed requests, each held against its known answer
    python -m benchmarks.bulk           20 k rows through Ray Data, killed in the middle
    python -m benchmarks.gpu            everything that needs a GPU, within 8 minutes
    python -m benchmarks.output_types   what smaller vectors cost in recall
    python -m benchmarks.quality        mteb, colors by name, ablations: see benchmarks/quality

Behind them: `checkpoints` and `workloads` make weights and items; `peers` are the libraries, `contenders` and `apps/`
the servers; `compare` lets libraries take turns, `load` drives servers; `limits`, `meter` and `gaps` measure what the
machine can do and what a process takes; `report` writes. Machines are noisy: read the ratios, not the times.
"""
