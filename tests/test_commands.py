"""The commands of the package begin without a wait: `--help` imports nothing that takes time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SLOW_IMPORTS = {"bentoml", "pyarrow", "ray", "starlette", "torch", "transformers"}  # 0.2 to 5 s each
COMMANDS = sorted(
    f"embedder.{path.parent.name}"
    for path in (ROOT / "embedder").glob("*/__main__.py")
    if "ArgumentParser" in path.read_text(encoding="utf-8")
)
HELP = """
import contextlib, json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
    runpy.run_module(sys.argv[0], run_name="__main__")
print(json.dumps(list(sys.modules)))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_slow(command: str) -> None:
    run = subprocess.run([sys.executable, "-c", HELP, command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"usage: python -m {command}" in run.stderr
    assert not SLOW_IMPORTS & set(json.loads(run.stdout))


def test_commands_are_found() -> None:
    assert {"embedder.bulk", "embedder.doctor", "embedder.search", "embedder.verify"} <= set(COMMANDS)


def test_importing_the_package_imports_nothing_slow() -> None:
    code = "import embedder, json, sys; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not (SLOW_IMPORTS | {"numpy", "pydantic"}) & set(json.loads(run.stdout))
