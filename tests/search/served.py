"""`python -m embedder.search --serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT


@contextmanager
def serving(output: Path, num_rows: int, *options: str, **settings: str) -> Iterator[str]:
    """Serve a collection of so many rows during the block. Yields the URL. `settings`: `EMBEDDER_<NAME>`."""
    command = [sys.executable, "-m", "embedder.search", str(output), "--serve", "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
    environment |= {f"EMBEDDER_{name.upper()}": value for name, value in settings.items()}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"search {num_rows} rows at (http://127\.0\.0\.1:\d+)/\n", line)
        try:
            assert found, line
            yield found[1]
        finally:
            process.terminate()
