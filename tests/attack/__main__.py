"""The command `python -m tests.attack [--seconds 600] [--seed N] [--only KIND ...] [--results FILE]`.

Quiet and attacked phases alternate, in turns of half a minute, so that both see the same machine. The verdict is the
last line, and the exit status is 1 if a quiet caller failed or got a wrong vector, its 99th percentile grew more than
5 times, memory exceeded what docs/operations/sizing.md says, or something is left afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.attack import campaign
from tests.conftest import start_server

MAX_SLOWDOWN = 5.0


def main() -> int:
    """Run a campaign against the bundled model, and print what it has measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=sorted(campaign.KINDS), help="kinds of attacks; default: all")
    parser.add_argument("--results", type=Path, help="file for the report, as JSON")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(Path(folder), **campaign.SETTINGS)
        try:
            report = campaign.run(server, seconds=chosen.seconds, seed=chosen.seed, only=chosen.only)
        finally:
            status = server.stop()
        log = server.log.read_text()
    faults = report.faults()
    faults += [
        f"{name}: p99 is {report.slowdown(name):.1f} times its quiet value; allowed: {MAX_SLOWDOWN}"
        for name in report.attacked
        if report.slowdown(name) > MAX_SLOWDOWN
    ]
    faults += [f"the service ended with status {status}"] if status else []
    faults += [f"{log.count('Traceback')} tracebacks in the log"] if "Traceback" in log else []
    if "Traceback" in log:
        print(log[max(0, log.index("Traceback") - 500) :][:8000])
    verdict = f"{len(faults)} FAULTS" if faults else "held"
    lines = [*report.lines(), *(f"FAULT: {fault}" for fault in faults), f"VERDICT: {verdict}"]
    print("\n".join(lines))
    if chosen.results:
        fields = {"seconds": chosen.seconds, "seed": chosen.seed, "verdict": verdict, "report": lines}
        chosen.results.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
