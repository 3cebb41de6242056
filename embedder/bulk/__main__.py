"""Embed a data set: OUTPUT gets one row for each row of INPUT, with its vector or its error.

Model and limits are set by the service's `EMBEDDER_` variables. After a crash or a kill, the same command resumes. If
files of INPUT were added, changed or removed, it embeds the new and changed ones, and removes the rows of removed ones.
Exit status: 0 all rows are embedded; 1 some parts are not written, run the command again; 2 the run could not start;
3 all parts are written, but some rows have an error instead of a vector.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from embedder.bulk.options import MIN_FILES_PER_PART, ROWS_PER_PART, OutputFormat
from embedder.engine.postprocess import OutputDtype


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        from embedder.bulk.command import run  # takes 2 s; --help and wrong arguments should not wait for it
    except ModuleNotFoundError as missing:
        raise SystemExit(f"{missing.name} is not installed: pip install -e '.[bulk]'") from None
    return run(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m embedder.bulk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input",
        type=Path,
        help="Parquet, JSONL, WebDataset tar, a folder of one of these, or a folder of pictures, PDFs and clips",
    )
    parser.add_argument("output", type=Path, help="folder (on a cluster: on a file system that all nodes share)")
    parser.add_argument("--format", choices=get_args(OutputFormat), default="parquet")
    for name, description in {
        "text": "column of the text",
        "image": "column of the image: bytes, base64, data URI, or a path inside the folder of INPUT",
        "video": "column of the video: bytes, base64, data URI, or a path inside the folder of INPUT",
        "instruction": "column of the instruction (default: EMBEDDER_DEFAULT_INSTRUCTION)",
        "id": "column of the row's id in OUTPUT (default: file and row number; of image files the path)",
    }.items():
        parser.add_argument(f"--{name}", metavar="COLUMN", help=description)
    parser.add_argument("--dimensions", type=int, help="size of the vectors (default: the model's)")
    parser.add_argument("--output-dtype", choices=get_args(OutputDtype), default="float32")
    parser.add_argument(
        "--rows-per-part",
        type=int,
        help=f"rows per file of OUTPUT (default: {ROWS_PER_PART}, of a folder of pictures and PDFs a thousandth of "
        f"its rows, at least {MIN_FILES_PER_PART})",
    )
    parser.add_argument("--no-text", action="store_true", help="leave out the column of the pages' text layers")
    parser.add_argument("--thumbnails", action="store_true", help="add a column of small pictures of the rows (JPEG)")
    parser.add_argument(
        "--segment-seconds",
        type=float,
        metavar="S",
        help="cut clips of a folder into segments of S seconds, a row each",
    )
    parser.add_argument("--address", help="address of a Ray cluster (default: this machine)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
