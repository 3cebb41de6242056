"""Build the Bento and its image, labeled with version and commit: `python -m deploy.build`.

    python -m deploy.build --backend podman                                     # GPU image
    python -m deploy.build --backend podman --opt build-arg=UV_FIND_LINKS=...   # CPU image, from torch's CPU wheel

`--opt` is passed to `bentoml containerize`. bentofile.yaml lists the files, service.py defines the build steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import embedder
from deploy.lock import CPU_LOCK, locked_versions

ROOT = Path(__file__).parents[1]
NAME = "qwen3-vl-embedding"
BENTOML = Path(sys.executable).with_name("bentoml")


def build(root: Path, image: str, backend: str, options: Sequence[str] = ()) -> None:
    """Build the Bento from the clone at `root`, then `image` from the Bento with `backend` (docker, podman ..)."""
    check_bentoml()
    bento = f"{NAME}:{embedder.__version__}"
    subprocess.run([BENTOML, "delete", "--yes", bento], capture_output=True, check=False)  # it may not exist
    subprocess.run([BENTOML, "build", "--version", embedder.__version__], cwd=root, check=True)
    labels = {"title": NAME, "version": embedder.__version__, "revision": revision(root), "licenses": "Apache-2.0"}
    options = [f"label=org.opencontainers.image.{name}={value}" for name, value in labels.items()] + list(options)
    arguments = [argument for option in options for argument in ("--opt", option)]
    subprocess.run([BENTOML, "containerize", bento, "--backend", backend, "-t", image, *arguments], check=True)


def check_bentoml() -> None:
    """Check that the running BentoML has the locked version. Raises `SystemExit`.

    BentoML adds `bentoml==<its own version>` to the requirements of every image, next to those of the lock file.
    """
    locked = locked_versions(CPU_LOCK)["bentoml"]
    if (running := version("bentoml")) != locked:
        raise SystemExit(
            f"BentoML {running} is installed, but deploy/requirements.txt has {locked}, so the requirements of the "
            f"image would conflict. Install bentoml=={locked}, or write a new lock file with `python -m deploy.lock`."
        )


def revision(root: Path) -> str:
    """The commit, with `-dirty` appended if files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="docker")
    parser.add_argument("--image", default=f"{NAME}:{embedder.__version__}", help="default: %(default)s")
    parser.add_argument("--opt", action="append", default=[])
    arguments = parser.parse_args()
    build(ROOT, arguments.image, arguments.backend, arguments.opt)


if __name__ == "__main__":
    main()
