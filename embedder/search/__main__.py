"""Search an output of `python -m embedder.bulk` by a question, by a picture, or by both.

The query is embedded by the model that EMBEDDER_MODEL names, which must be the one that has embedded the output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from embedder.search.options import DEFAULT_CANDIDATES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        from embedder.search.command import run  # takes 3 s; --help and wrong arguments should not wait for it
    except ModuleNotFoundError as missing:
        raise SystemExit(f"{missing.name} is not installed: pip install -e '.[bulk]'") from None
    return run(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m embedder.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="OUTPUT of embedder.bulk")
    parser.add_argument("question", nargs="?", default="", help="what to search for")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to search by")
    parser.add_argument("--limit", type=int, default=10, help="number of results (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument(
        "--rerank",
        nargs="?",
        const="",
        metavar="MODEL",
        help="let a reranker judge the best results again: a checkpoint folder, a hub id or `bundled` (default: "
        "EMBEDDER_RERANKER)",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help=f"number of results by similarity that --rerank judges (default: {DEFAULT_CANDIDATES}, at least --limit)",
    )
    parser.add_argument("--serve", action="store_true", help="serve a page in which to search and look at the results")
    parser.add_argument("--host", default="127.0.0.1", help="address that --serve listens on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=3000, help="port of --serve (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
