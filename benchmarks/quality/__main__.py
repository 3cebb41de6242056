"""`python -m benchmarks.quality COMMAND`: see `benchmarks.quality`."""

from __future__ import annotations

import importlib
import sys

import benchmarks.quality

COMMANDS = {
    "colors": "colors",
    "mteb": "suite",
    "rerank": "reranking",
    "ablations": "ablations",
    "report": "everything",
}

if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("-h", "--help"):
        print(benchmarks.quality.__doc__)
        sys.exit(0)
    if command not in COMMANDS:
        sys.exit(f"got {command!r} as COMMAND; allowed: {', '.join(COMMANDS)}\n\n{benchmarks.quality.__doc__}")
    module = importlib.import_module(f"benchmarks.quality.{COMMANDS[command]}")  # each needs other packages
    sys.exit(module.main(sys.argv[2:]))
