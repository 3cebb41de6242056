"""Print an image's bill of materials in CycloneDX format: `python -m deploy.sbom IMAGE > sbom.cdx.json`.

It lists the Python and the Debian packages. The CycloneDX tool runs inside the image, from a mounted folder that is not
part of the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

TOOL = "cyclonedx-bom==7.5.0"
LOOK = """
import runpy, sys
sys.path.append("/tool")
sys.argv = ["cyclonedx-py", "environment", "--output-format", "JSON", "--output-reproducible", sys.executable]
runpy.run_module("cyclonedx_py", run_name="__main__")
"""


def bill_of_materials(image: str, engine: Sequence[str]) -> dict[str, Any]:
    """The CycloneDX document of `image`. `engine`: the command that runs a container, such as `docker run`."""
    with tempfile.TemporaryDirectory() as tool:
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-warn-conflicts", "--target", tool, TOOL]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        look = [*engine, "--rm", "--user", "root", "-v", f"{tool}:/tool:ro", "--entrypoint"]
        document: dict[str, Any] = json.loads(output_of([*look, "python", image, "-c", LOOK]))
        packages = output_of([*look, "dpkg-query", image, "--show", "--showformat", r"${Package} ${Version}\n"])
    for line in packages.splitlines():
        name, version = line.split()
        purl = f"pkg:deb/debian/{name}@{version}"
        document["components"].append(
            {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
        )
    return document


def output_of(command: Sequence[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--engine", default="docker run", help="default: %(default)s")
    arguments = parser.parse_args()
    json.dump(bill_of_materials(arguments.image, arguments.engine.split()), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
