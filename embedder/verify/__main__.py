"""The command `python -m embedder.verify`.

    python -m embedder.verify MODEL [--examples FOLDER] [--reranker RERANKER] [--url URL [--key-file FILE]]

MODEL is a checkpoint folder, a hub id, or `bundled`, the small model in the package. With `--url`, the running service
is checked over HTTP, and compared with MODEL if MODEL is a folder on this machine or `bundled`. With `--examples`, the
published values are compared; it names the folder `examples/` of the authors' repository, to which demo.jpeg, car.jpg
and bee.jpg may be added. Checks that cannot run are listed with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from embedder.errors import InvalidRequest, ModelUnavailable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m embedder.verify",
        description="Check a checkpoint or a running service. Nothing is changed.",
        epilog=(
            "Exit status: 0 no check failed, 1 a check failed or a published value differs, 2 nothing could be "
            "checked, 3 nothing failed, but published values that were asked for could not be compared."
        ),
    )
    parser.add_argument("model", help="a checkpoint folder, a hub id, or `bundled` (the small model in the package)")
    parser.add_argument("--url", default="", help="a running service that serves MODEL; it is checked over HTTP")
    parser.add_argument("--key-file", type=Path, help="file whose first line is the API key for the service")
    parser.add_argument("--image", type=Path, help="demo.jpeg of the Qwen-VL assets, for the published values")
    parser.add_argument(
        "--examples", type=Path, help="`examples/` of the authors' repository, for the published values"
    )
    parser.add_argument("--reranker", default="", help="a reranker to compare, too; default: EMBEDDER_RERANKER")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N, xpu, xpu:N or mps (for MODEL in this process)"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--weights", choices=("int8", "fp8"), help="as EMBEDDER_WEIGHTS (for MODEL in this process)")
    parser.add_argument("--max-pixels", type=int, help="as EMBEDDER_MAX_PIXELS (for MODEL in this process)")
    chosen = vars(parser.parse_args(arguments))
    if chosen["url"] and not chosen["url"].startswith(("http://", "https://")):
        parser.error(f"--url: got {chosen['url']!r}; it must start with http:// or https://")
    # These take 5 s; --help and wrong arguments should not wait for them
    from embedder.settings import Settings
    from embedder.verify.checks import verify
    from embedder.verify.http_service import ServiceUnreachable
    from embedder.verify.published_checks import wants_published
    from embedder.verify.results import format_table

    try:
        image, key_file = chosen.pop("image"), chosen.pop("key_file")
        key = key_file.read_text(encoding="utf-8").partition("\n")[0].strip() if key_file else ""
        chosen["reranker"] = chosen["reranker"] or Settings.from_environment().reranker
        chosen["image"] = image.read_bytes() if image else None
        checks = verify(key=key, **chosen)
    except (ModelUnavailable, ServiceUnreachable, InvalidRequest, OSError, ValueError) as error:
        parser.error(str(error))
    print(format_table(checks))
    if any(row.verdict in ("FAILED", "differs") for row in checks):
        return 1
    asked = wants_published(chosen["model"], chosen["reranker"], chosen["image"], chosen["examples"])
    return 3 if asked and any(row.verdict.startswith("not run") for row in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
