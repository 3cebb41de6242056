"""The README's start command serves from a fresh clone. Installs for minutes, so CI runs it by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.docs.markdown import blocks
from tests.docs.test_snippets import check_response

README = ROOT / "README.md"


def test_readme_has_the_commands_that_ci_looks_for() -> None:
    text = README.read_text(encoding="utf-8")
    assert "pip install -qq -e . && .venv/bin/bentoml serve --port 3000" in text
    assert "pip install -qq -e '.[test]' && .venv/bin/pytest" in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_start_command_serves_from_a_fresh_clone(tmp_path: Path) -> None:
    """Command one as written, and the request as written."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    serve, curl = [block.text for block in blocks(README) if block.language == "sh"][:2]
    (shown, *_) = [block for block in blocks(README) if block.mark == "response"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EMBEDDER_", "VIRTUAL"))}
    process = subprocess.Popen(["bash", "-c", serve], cwd=tmp_path / "clone", env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get("http://localhost:3000/readyz", timeout=2).status_code == 200:
                    break
            time.sleep(1)
        run = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
        assert json.loads(run.stdout)["model"] == "bundled"
        check_response(shown, 200, run.stdout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
