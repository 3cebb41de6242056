"""An install that is not editable has every file of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def test_wheel_has_every_file_of_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building leaves files behind
    shutil.copytree(ROOT / "embedder", source / "embedder", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "service.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "embedder").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {"service.py", *(name for name in expected if "__pycache__" not in name)}
