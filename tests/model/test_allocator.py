"""torch's allocator for the memory of a GPU. Without a GPU, only its settings can be seen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64")],
)
def test_segments_grow_unless_the_environment_says_otherwise(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")} | given
    code = "import embedder, torch; print(torch._C._accelerator_getAllocatorSettings())"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
    assert printed == f"{expected}\n"
