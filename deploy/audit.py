"""Look for known vulnerabilities in the locked packages of both images: `python -m deploy.audit`.

It runs pip-audit on the lock files. Exit status: 0 no package has a known vulnerability, 1 a package has one, 2 not
all packages could be checked, because the database was not reached or does not know them. pip-audit itself reports
"No known vulnerabilities found" with status 0 in that case.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.lock import CPU_LOCK, CUDA_LOCK, locked_versions

LISTED = 5  # packages that are named in a line


@dataclass(frozen=True)
class Audit:
    """`found`: one line for each vulnerability. `unchecked`: names of the packages that were not checked.

    `reason`: why pip-audit gave no result at all; empty if it gave one.
    """

    num_packages: int
    found: tuple[str, ...]
    unchecked: tuple[str, ...]
    reason: str = ""

    @property
    def status(self) -> int:
        return 1 if self.found else 2 if self.unchecked else 0

    def __str__(self) -> str:
        lines = list(self.found)
        if self.unchecked:
            names = ", ".join(self.unchecked[:LISTED]) + (", ..." if len(self.unchecked) > LISTED else "")
            reason = self.reason or "the package index has no record of them"
            lines.append(f"NOT CHECKED: {len(self.unchecked)} of {self.num_packages} packages ({names}): {reason}")
        if self.status != 2 or len(self.unchecked) < self.num_packages:
            checked = self.num_packages - len(self.unchecked)
            lines.append(f"{checked} packages checked, {len(self.found)} known vulnerabilities")
        return "\n".join(lines)


def audit(versions: Mapping[str, str]) -> Audit:
    """Run pip-audit on packages by name."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json", "-r", requirements]
        run = subprocess.run([sys.executable, "-m", "pip_audit", *options], capture_output=True, text=True, check=False)
    return read_result(run.stdout, run.stderr, versions)


def read_result(output: str, log: str, versions: Mapping[str, str]) -> Audit:
    """What pip-audit has printed: JSON, or nothing if it failed."""
    try:
        packages = json.loads(output)["dependencies"]
    except ValueError:
        reason = log.strip().rpartition("\n")[2] or "pip-audit printed nothing"
        return Audit(len(versions), (), tuple(versions), reason)
    results = {package["name"]: package for package in packages}
    found = [
        f"{name} {versions[name]}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'no version'}"
        for name in versions
        for fault in results.get(name, {}).get("vulns", ())
    ]
    unchecked = [name for name in versions if "vulns" not in results.get(name, {})]
    return Audit(len(versions), tuple(found), tuple(unchecked))


def main() -> int:
    result = audit(locked_versions(CPU_LOCK, CUDA_LOCK))
    print(result)
    return result.status


if __name__ == "__main__":
    sys.exit(main())
