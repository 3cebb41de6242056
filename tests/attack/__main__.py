"""The command `python -m tests.attack [--seconds 600] [--seed N] [--only KIND ...]`.

Exit status 1 if a quiet caller failed, its 99th percentile grew more than 5 times, memory exceeded `--max-mb`, or
something is left afterwards.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--max-mb", type=float, default=4096.0, help="memory of a worker and its processes")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(Path(folder), device="cpu", request_timeout_s="10")
        try:
            report = campaign.run(server, seconds=chosen.seconds, seed=chosen.seed, only=chosen.only)
        finally:
            server.stop()
    faults = report.faults()
    faults += [
        f"{name}: p99 is {report.slowdown(name):.1f} times its quiet value; allowed: {MAX_SLOWDOWN}"
        for name in report.attacked
        if report.slowdown(name) > MAX_SLOWDOWN
    ]
    if report.peak.rss_mb > chosen.max_mb:
        faults.append(f"memory: {report.peak.rss_mb:.0f} MB; allowed: {chosen.max_mb:.0f} MB")
    print("\n".join([*report.lines(), *(f"FAULT: {fault}" for fault in faults)]))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
