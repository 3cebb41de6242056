"""The command `python -m tests.contracts [--environment FOLDER]`.

Installs the clients of requirements.txt into an environment of their own, starts the service with the bundled model,
and prints a table of contracts and checks. Exit status 1 if a check fails. The JDK's check needs `java`, curl's `curl`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT, start_server

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def install(environment: Path) -> Path:
    """The Python of an environment with the clients."""
    python = environment / "bin" / "python"
    uv = Path(sys.executable).parent / "uv"
    if not python.exists():
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, environment], check=True)
    subprocess.run([uv, "pip", "install", "-q", "--python", python, "-r", REQUIREMENTS], check=True)
    return python


def main() -> int:
    """Run all checks with the real clients, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.contracts", description=__doc__)
    parser.add_argument("--environment", type=Path, help="folder that keeps the clients; default: a temporary one")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = install(chosen.environment or Path(folder) / "clients")
        server = start_server(Path(folder), device="cpu", dtype="float32")
        try:
            command = [python, "-m", "tests.contracts.checks", server.url]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
        finally:
            server.stop()
    rows = json.loads(done.stdout.splitlines()[-1])
    print("| contract | check | source | outcome |\n|---|---|---|---|")
    for row in rows:
        passed = f"refused on purpose: {row['refusal']}" if row["refusal"] else "passes"
        outcome = f"FAILS: {row['error']}" if row["error"] else passed
        print(f"| {row['contract']} | {row['check']} | {row['source']} | {outcome} |")
    return any(row["error"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
