"""`bentoml build` gives a versioned Bento that serves from anywhere, with the published model by default."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import httpx
import pathspec
import pytest
import yaml

from deploy.build import check_bentoml
from deploy.lock import CPU_LOCK, locked_versions
from embedder.model.checkpoint import PUBLISHED
from tests.conftest import ROOT, start_server

UV = str(Path(sys.executable).parent / "uv")
BENTOML = str(Path(sys.executable).parent / "bentoml")


@pytest.fixture(scope="module")
def bento_tag(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("bentoml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home))
        subprocess.run([BENTOML, "build", "--output", "tag"], cwd=ROOT, check=True, capture_output=True)
        folders = [folder for folder in (home / "bentos" / "qwen3-vl-embedding").iterdir() if folder.is_dir()]
    assert len(folders) == 1
    return f"{home}|qwen3-vl-embedding:{folders[0].name}"


@pytest.mark.slow
def test_bento_serves_from_another_folder(bento_tag: str, random_checkpoint: Path, tmp_path: Path) -> None:
    home, tag = bento_tag.split("|")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", home)
        server = start_server(tmp_path, target=tag, cwd=tmp_path, model=str(random_checkpoint))
    answer = httpx.post(f"{server.url}/txt/embed", json={"input": "red"})
    assert answer.json()["dimensions"] == 192
    assert server.stop() == 0


def test_image_has_no_file_of_the_other_folders() -> None:
    """The patterns are those of .gitignore: a name without a slash is included from every folder."""
    patterns = yaml.safe_load((ROOT / "bentofile.yaml").read_text(encoding="utf-8"))["include"]
    included = pathspec.GitIgnoreSpec.from_lines(patterns)
    others = ("benchmarks", "deploy", "docs", "tests", "training")
    files = [path.relative_to(ROOT) for folder in others for path in (ROOT / folder).rglob("*") if path.is_file()]
    wrong = {str(path) for path in files if included.match_file(path)} - {
        "deploy/requirements.txt",
        "deploy/requirements-cuda.txt",
    }
    assert not wrong


@pytest.mark.slow
def test_bento_without_its_model_does_not_start_and_says_why(bento_tag: str, tmp_path: Path) -> None:
    home, tag = bento_tag.split("|")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
    environment |= {"BENTOML_HOME": home, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [BENTOML, "serve", tag, "--port", "0"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    output = run.stdout + run.stderr
    assert f"the service does not start: model {PUBLISHED} at revision" in output
    assert "set EMBEDDER_MODEL to its folder" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_requirements_of_the_image_can_be_resolved(bento_tag: str, tmp_path: Path) -> None:
    """As the image resolves them, with the requirement on itself that BentoML adds; nothing is installed."""
    home, tag = bento_tag.split("|")
    bento = Path(home) / "bentos" / tag.replace(":", "/")
    requirements = bento / "env" / "python" / "requirements.txt"
    assert f"bentoml=={version('bentoml')}" in requirements.read_text().splitlines()
    constraints = bento / "src" / "deploy" / "requirements-cuda.txt"
    command = [UV, "pip", "install", "--dry-run", "--no-build", "--target", tmp_path, "--python-version", "3.11"]
    run = subprocess.run(
        [*command, "-r", requirements, "-c", constraints], capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr


def test_build_refuses_another_bentoml_than_the_lock_has(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bentoml()
    monkeypatch.setattr("deploy.build.version", lambda _: "1.4.0")
    with pytest.raises(SystemExit, match=r"BentoML 1\.4\.0 is installed, but deploy/requirements\.txt has 1\."):
        check_bentoml()


def test_pyproject_and_lock_have_the_same_bentoml() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"bentoml=={locked_versions(CPU_LOCK)['bentoml']}" in project["dependencies"]


def test_bento_contains_the_page_and_no_bundled_models(bento_tag: str) -> None:
    home, tag = bento_tag.split("|")
    sources = Path(home) / "bentos" / tag.replace(":", "/") / "src"
    assert (sources / "embedder" / "engine" / "engine.py").is_file()
    assert (sources / "embedder" / "playground" / "index.html").is_file()
    assert not list((sources / "embedder").glob("default_*"))
    assert not (sources / "embedder" / "demo").exists()
    assert sum(path.stat().st_size for path in sources.rglob("*")) < 2_000_000
