"""The command `python -m embedder.doctor [MODEL] [--port PORT]`: whether the service would start here, and with what.

It reads the settings from the environment, as the service does, and checks everything that can make a start fail,
without loading the weights or downloading anything. Exit status: 0 the service would start, 1 it would not.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m embedder.doctor",
        description="Check whether the service would start here, and print what it would use. Nothing is loaded.",
        epilog="Exit status: 0 the service would start, 1 it would not.",
    )
    parser.add_argument("model", nargs="?", default="", help="as EMBEDDER_MODEL: a checkpoint folder or a hub id")
    parser.add_argument("--host", default="", help="address that the service would listen on; default: all")
    parser.add_argument("--port", type=int, default=3000)
    chosen = parser.parse_args(arguments)
    from embedder.doctor.report import examine  # takes 2 s; --help should not wait for it

    report = examine(chosen.model, chosen.host, chosen.port)
    print(report)
    return int(report.num_faults > 0)


if __name__ == "__main__":
    logging.getLogger("embedder").setLevel(logging.ERROR)  # the report says it all
    sys.exit(main())
