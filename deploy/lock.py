"""`python -m deploy.lock CPU_WHEELS`: pyproject.toml's dependencies -> the versions and hashes that the image installs.

Two files, so that one Bento makes both images: `requirements.txt` is what every image has, `requirements-cuda.txt`
what torch's CUDA build asks for besides. uv gets the second as constraints and installs none of it for the CPU build.
CPU_WHEELS is the folder or page with torch's CPU wheel: its hash stands beside those of the CUDA wheels.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
UV = Path(sys.executable).with_name("uv")
OPTIONS = "--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate -q"


def compile_lock(*options: str) -> dict[str, list[str]]:
    """Name of each package -> its lines: `name==version`, then its hashes."""
    command = [UV, "pip", "compile", "pyproject.toml", *OPTIONS.split(), *options]
    lock = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent).stdout
    pins = [block.replace(" \\\n", "\n").splitlines() for block in re.split(r"\n(?=\w)", lock.strip())]
    return {pin[0].partition("==")[0]: pin for pin in pins}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cpu_wheels")
    parser.add_argument("--constraint", default="/dev/null", help="versions to keep, as `uv pip freeze` prints them")
    arguments = parser.parse_args()
    cuda = compile_lock("--constraint", arguments.constraint)
    both = compile_lock("--constraint", arguments.constraint, "--find-links", arguments.cpu_wheels)
    both["torch"] = cuda["torch"] + both["torch"][1:]
    write("requirements.txt", both)
    write("requirements-cuda.txt", {name: pin for name, pin in cuda.items() if name not in both})


def write(name: str, pins: dict[str, list[str]]) -> None:
    lines = ["# Made by `python -m deploy.lock`.", *(" \\\n".join(pin) for pin in pins.values())]
    (HERE / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
