"""The command `python -m embedder.verify`.

    python -m embedder.verify MODEL [--url URL [--key-file FILE]] [--image demo.jpeg]

MODEL is a checkpoint folder, a hub id, or `bundled`, the small model in the package. With `--url`, the running service
is checked over HTTP, and compared with MODEL if MODEL is a folder on this machine or `bundled`. Checks that cannot run
are listed with the reason. Exit status: 0 no check failed, 1 a check failed, 2 nothing could be checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from embedder.errors import InvalidRequest, ModelUnavailable
from embedder.verify.checks import verify
from embedder.verify.http_service import ServiceUnreachable
from embedder.verify.results import format_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m embedder.verify",
        description="Check a checkpoint or a running service. Nothing is changed.",
        epilog="Exit status: 0 no check failed, 1 a check failed, 2 nothing could be checked.",
    )
    parser.add_argument("model", help="a checkpoint folder, a hub id, or `bundled` (the small model in the package)")
    parser.add_argument("--url", default="", help="a running service that serves MODEL; it is checked over HTTP")
    parser.add_argument("--key-file", type=Path, help="file whose first line is the API key for the service")
    parser.add_argument("--image", type=Path, help="demo.jpeg of the Qwen-VL assets, for the published values")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (for MODEL in this process)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--max-pixels", type=int, help="as EMBEDDER_MAX_PIXELS (for MODEL in this process)")
    chosen = vars(parser.parse_args(arguments))
    if chosen["url"] and not chosen["url"].startswith(("http://", "https://")):
        parser.error(f"--url: got {chosen['url']!r}; it must start with http:// or https://")
    try:
        image, key_file = chosen.pop("image"), chosen.pop("key_file")
        key = key_file.read_text(encoding="utf-8").partition("\n")[0].strip() if key_file else ""
        checks = verify(key=key, image=image.read_bytes() if image else None, **chosen)
    except (ModelUnavailable, ServiceUnreachable, InvalidRequest, OSError, ValueError) as error:
        parser.error(str(error))
    print(format_table(checks))
    return int(any(row.verdict == "FAILED" for row in checks))


if __name__ == "__main__":
    sys.exit(main())
