"""Run the tests with the newest packages that pyproject.toml allows: `python -m deploy.newest [PYTEST_OPTION ...]`.

It installs them into a temporary environment, prints which are newer than the locked ones, and runs `pytest` there
(default options: `-n 2 --dist loadfile`). The exit status is that of pytest. `--list` prints the versions only.
Run it every week: a release of another project breaks here first, and not in a fresh installation of a user.

torch brings gigabytes of CUDA libraries, unless `UV_FIND_LINKS` names the folder or page with its CPU wheel. A package
of the tests may need an older version of a package than a user gets; such packages are printed, but not tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.build import ROOT
from deploy.lock import CPU_LOCK, UV, locked_versions
from deploy.sbom import normalized


def differences(locked: Mapping[str, str], newest: Mapping[str, str]) -> list[str]:
    """One line for each package of the image whose newest allowed version is not the locked one."""
    pairs = [(name, version, newest.get(name, "not installed")) for name, version in locked.items()]
    return [f"{name}: locked {old}, newest {new}" for name, old, new in pairs if old != new.partition("+")[0]]


def held_back(plain: Mapping[str, str], newest: Mapping[str, str]) -> list[str]:
    """One line for each package of a plain installation that is older next to the packages of the tests."""
    return [
        f"{name}: newest {version}, but {newest[name]} with the packages of the tests"
        for name, version in plain.items()
        if name in newest and newest[name].partition("+")[0] != version.partition("+")[0]
    ]


def resolve(*options: str) -> dict[str, str]:
    """The newest allowed versions of the service's packages, by normalized name."""
    command = [UV, "pip", "compile", "-q", "--upgrade", "--no-header", "--no-annotate", *options, "pyproject.toml"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.partition(";")[0].strip() for line in run.stdout.splitlines()]
    return {normalized(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def installed(python: Path) -> dict[str, str]:
    """The versions in an environment, by normalized name."""
    command = [UV, "pip", "list", "-q", "--python", python, "--format", "json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {normalized(package["name"]): package["version"] for package in json.loads(run.stdout)}


def run_tests(options: Sequence[str]) -> int:
    """Install everything into a temporary environment and run the tests there."""
    with tempfile.TemporaryDirectory(prefix="newest-") as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([UV, "venv", "-q", "--seed", "--python", sys.executable, folder], check=True)
        install = [UV, "pip", "install", "-q", "--python", python, "--upgrade", "-e", f"{ROOT}[test]"]
        subprocess.run(install, check=True)
        report(installed(python))
        return subprocess.run([python, "-m", "pytest", *options], cwd=ROOT, check=False).returncode


def report(newest: Mapping[str, str]) -> None:
    locked = {normalized(name): version for name, version in locked_versions(CPU_LOCK).items()}
    lines = differences(locked, newest) + held_back(resolve(), newest)
    print("\n".join(lines) or "the locked versions are the newest", flush=True)


def main(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--list"]:
        report(resolve("--extra", "test"))
        return 0
    return run_tests(arguments or ["-n", "2", "--dist", "loadfile"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
