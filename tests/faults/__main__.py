"""The command `python -m tests.faults [--only NAME ...]`: exit status 1 if a fault did what it must not do."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults import campaign


def main() -> int:
    """Cause each fault in a service with 64 callers, and print what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    faults = {one.cause.__name__: one for one in campaign.FAULTS}
    parser.add_argument("--only", nargs="+", choices=list(faults), default=list(faults), help="default: all")
    chosen = parser.parse_args()
    is_wrong = False
    with tempfile.TemporaryDirectory() as folder, campaign.running(Path(folder)) as running:
        for name in chosen.only:
            try:
                report = campaign.run(running, faults[name])
            except campaign.NotPossibleHere as error:
                print(f"{faults[name].name:26} not caused here: {error}", flush=True)
                continue
            print(report.line(), flush=True)
            for outcome in report.mistakes():
                is_wrong = True
                print(f"FAULT: {report.outcomes[outcome]} callers got: {outcome}", flush=True)
    return is_wrong


if __name__ == "__main__":
    sys.exit(main())
