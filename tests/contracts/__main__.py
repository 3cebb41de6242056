"""The command `python -m tests.contracts [--environments FOLDER] [--vllm FOLDER]`.

Installs the clients of each requirements file into an environment of its own, starts the service with the bundled
model and a random reranker, and prints a table of contracts and checks. Exit status 1 if a check fails. The JDK's check
needs `java`, curl's `curl`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import random_checkpoint
from tests.conftest import ROOT, start_server
from tests.contracts.checks import LEFT_OUT, VLLM

REQUIREMENTS = sorted(Path(__file__).parent.glob("*.txt"), reverse=True)


def install(requirements: Path, environment: Path) -> Path:
    """The Python of an environment with the clients."""
    python = environment / "bin" / "python"
    uv = Path(sys.executable).parent / "uv"
    if not python.exists():
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, environment], check=True)
    subprocess.run([uv, "pip", "install", "-q", "--python", python, "-r", requirements], check=True)
    return python


def main() -> int:
    """Run all checks with the real clients, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.contracts", description=__doc__)
    parser.add_argument("--environments", type=Path, help="folder that keeps the clients; default: a temporary one")
    parser.add_argument("--vllm", type=Path, help="folder of an environment with vLLM; see benchmarks/server.py")
    chosen = parser.parse_args()
    left_out = dict(LEFT_OUT)
    if chosen.vllm:
        os.environ["PATH"] = f"{chosen.vllm / 'bin'}{os.pathsep}{os.environ['PATH']}"
        del left_out[VLLM]
    with tempfile.TemporaryDirectory() as folder:
        environments = chosen.environments or Path(folder) / "clients"
        pythons = {one.stem: install(one, environments / one.stem) for one in REQUIREMENTS}
        reranker = Path(folder) / "reranker"
        random_checkpoint.main(["tiny", str(reranker), "--reranker", "--dtype", "float32"])
        server = start_server(Path(folder), model="bundled", reranker=str(reranker), device="cpu")
        try:
            rows = []
            for name, python in pythons.items():
                command = [python, "-m", "tests.contracts.checks", server.url, name, *left_out]
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=1200)
                rows += json.loads(done.stdout.splitlines()[-1])
        finally:
            server.stop()
    print("| contract | check | source | outcome |\n|---|---|---|---|")
    for row in rows:
        passed = f"refused on purpose: {row['refusal']}" if row["refusal"] else "passes"
        outcome = f"FAILS: {row['error']}" if row["error"] else passed
        print(f"| {row['contract']} | {row['check']} | {row['source']} | {outcome} |")
    for client, reason in left_out.items():
        print(f"| {client} | | | left out: {reason} |")
    return any(row["error"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
