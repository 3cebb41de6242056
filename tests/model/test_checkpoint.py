"""The checkpoint that the settings name is found, or the error says what was looked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.errors import ModelUnavailable
from embedder.model.checkpoint import BUNDLED, Checkpoint, find_checkpoint, find_reranker, role_of
from embedder.settings import Settings


def test_folder_is_taken_as_it_is(random_checkpoint: Path) -> None:
    name = str(random_checkpoint)
    assert find_checkpoint(Settings(model=name)) == Checkpoint(random_checkpoint, name, "", is_bundled=False)


def test_bundled_reranker_has_a_name_of_its_own(random_reranker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients tell the models of `/v1/models` apart by their names."""
    monkeypatch.setattr("embedder.model.checkpoint.BUNDLED_RERANKER", random_reranker)
    found = find_reranker(Settings(reranker="bundled"))
    assert found == Checkpoint(random_reranker, "bundled-reranker", "", is_bundled=True)
    assert find_checkpoint(Settings(model="bundled")).name == "bundled"


def test_bundled_models_are_not_in_a_bento(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BUNDLED", "BUNDLED_RERANKER"):
        monkeypatch.setattr(f"embedder.model.checkpoint.{name}", tmp_path / "none")
    with pytest.raises(ModelUnavailable, match=r"^EMBEDDER_MODEL='bundled': this installation has no such model"):
        find_checkpoint(Settings(model="bundled"))
    with pytest.raises(ModelUnavailable, match=r"^EMBEDDER_RERANKER='bundled': this installation has no such model"):
        find_reranker(Settings(reranker="bundled"))


def test_bundled_embedding_model_is_no_reranker() -> None:
    """It has the tokens of a reranker, but scores nothing."""
    with pytest.raises(ModelUnavailable, match="is an embedding model, whose scores would mean nothing"):
        find_reranker(Settings(reranker=str(BUNDLED)))


@pytest.mark.parametrize("model", ["no-such-folder", "./a/b", "/no/such", "~/model", "a/b/c", "../no-such"])
def test_name_that_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        find_checkpoint(Settings(model=model))
    assert str(caught.value) == f"EMBEDDER_MODEL={model!r} is neither a folder nor a hub id (owner/name)"


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json: not a checkpoint$"):
        find_checkpoint(Settings(model=str(tmp_path)))


@pytest.mark.parametrize("content", ["{", "", "\ufeff{}"])
def test_config_that_is_not_json_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelUnavailable, match=r"config\.json is not valid JSON: "):
        find_checkpoint(Settings(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["config.json", "config_sentence_transformers.json"])
def test_file_that_holds_no_object_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}', encoding="utf-8")
    (tmp_path / name).write_text("[]", encoding="utf-8")
    with pytest.raises(ModelUnavailable, match=rf"{name} holds list; allowed: a JSON object$"):
        find_checkpoint(Settings(model=str(tmp_path)))


@pytest.mark.parametrize("architectures", ["null", "[]", '["Qwen3VLForConditionalGeneration"]'])
def test_list_of_architectures_may_be_missing(architectures: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "qwen3_vl", "architectures": {architectures}}}')
    assert role_of(find_checkpoint(Settings(model=str(tmp_path)))) is None


@pytest.mark.parametrize(("content", "found"), [('{"model_type": "qwen2_vl"}', "'qwen2_vl'"), ("{}", "null")])
def test_other_architectures_are_refused_by_name(content: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelUnavailable, match=f"has model_type {found}; only qwen3_vl can be served$"):
        find_checkpoint(Settings(model=str(tmp_path)))


@pytest.mark.parametrize("revision", ["", "abc123"])
def test_hub_id_that_cannot_be_fetched_says_what_to_do(revision: str, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its variables once, at import."""
    code = (
        "from embedder.model.checkpoint import find_checkpoint; from embedder.settings import Settings\n"
        "from embedder.errors import ModelUnavailable\n"
        f"try: find_checkpoint(Settings(model='owner/name', revision={revision!r}))\n"
        "except ModelUnavailable as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    wanted = "model owner/name at revision abc123" if revision else "model owner/name"
    assert run.stdout.startswith(f"{wanted} is not in the local cache and could not be downloaded (HF_HUB_OFFLINE is")
    assert run.stdout.endswith("mount a checkpoint and set EMBEDDER_MODEL to its folder\n")


def test_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/1.incomplete")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelUnavailable, match=r"could not be downloaded: No space left on device\. Make"):
        find_checkpoint(Settings(model="owner/name"))
