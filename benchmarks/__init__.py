"""Benchmarks of speed and quality, with peers on the same weights. `benchmarks/README.md` lists the commands.

Modules: `drawings` has the pictures of the demo collection; `checkpoints` and `workloads` create weights and items;
`peers` are the libraries, `contenders` and `apps/` the servers; `compare` runs libraries in turns, `load` sends
requests to servers; `limits`, `meter` and `gaps` measure the machine and a process; `report` writes results. Times vary
on a shared machine; compare the ratios.
"""

import embedder  # noqa: F401 - before torch, whose OpenMP reads the wait policy that it sets
