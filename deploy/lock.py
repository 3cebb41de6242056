"""Lock the versions and hashes of the packages in the image: `python -m deploy.lock CPU_WHEELS`.

Writes two files from pyproject.toml, so that one Bento builds both images. `requirements.txt` lists the packages of
every image. `requirements-cuda.txt` lists the additional packages of torch's CUDA build; uv reads it as constraints, so
the CPU image installs none of them. CPU_WHEELS is the folder or page with torch's CPU wheel; its hash is added to the
hashes of torch. A package of the extra `test` may need an older version of a package; then that version is locked,
because the tests cannot run with a newer one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
UV = Path(sys.executable).with_name("uv")
CPU_LOCK, CUDA_LOCK = "requirements.txt", "requirements-cuda.txt"
OPTIONS = "--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate -q"


def compile_lock(*options: str) -> dict[str, list[str]]:
    """Run `uv pip compile`. Returns the lines of each package by its name: `name==version`, then hashes."""
    command = [UV, "pip", "compile", "pyproject.toml", *OPTIONS.split(), *options]
    lock = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent).stdout
    pins = [block.replace(" \\\n", "\n").splitlines() for block in re.split(r"\n(?=\w)", lock.strip())]
    return {pin[0].partition("==")[0]: pin for pin in pins}


def locked_versions(*names: str) -> dict[str, str]:
    """The version of each package in the lock files `names`."""
    texts = [(HERE / name).read_text(encoding="utf-8") for name in names]
    return {name: version for text in texts for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cpu_wheels")
    parser.add_argument("--constraint", default="/dev/null", help="file of versions to keep, as from `uv pip freeze`")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as tested:
        kept = ("--constraint", arguments.constraint)
        tested.writelines(f"{pin[0]}\n" for pin in compile_lock(*kept, "--extra", "test").values())
        tested.flush()
        kept += ("--constraint", tested.name)
        cuda = compile_lock(*kept)
        both = compile_lock(*kept, "--find-links", arguments.cpu_wheels)
    both["torch"] = cuda["torch"] + both["torch"][1:]
    write(CPU_LOCK, both)
    write(CUDA_LOCK, {name: pin for name, pin in cuda.items() if name not in both})


def write(name: str, pins: dict[str, list[str]]) -> None:
    lines = ["# Made by `python -m deploy.lock`.", *(" \\\n".join(pin) for pin in pins.values())]
    (HERE / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
