"""What the doctor finds before a start."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedder.doctor import __main__ as doctor
from embedder.errors import ModelUnavailable
from embedder.model.memory import check_memory
from embedder.models import Models
from embedder.settings import Settings


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def rows_of(text: str) -> dict[str, tuple[str, str]]:
    """Name -> verdict and text."""
    *lines, _ = text.splitlines()
    return {line[:12].strip(): (line[12:20].strip(), line[20:]) for line in lines}


def test_healthy_machine_has_no_fault_and_shows_what_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--port", "0"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("\nThe service would start.\n")
    rows = rows_of(output)
    assert {verdict for verdict, _ in rows.values()} == {"ok"}
    assert rows["settings"][1] == "all defaults"
    assert rows["model"][1].startswith("bundled in ")
    assert rows["execution"][1].startswith(("eager", "graphs"))
    assert rows["compiler"][1].startswith(("/", "none"))
    assert "GiB of weights" in rows["memory"][1]


def test_weights_in_8_bits_are_shown_and_take_less_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, sizes = [], []

    def record(*asked: Any) -> int:
        sizes.append(check_memory(*asked))
        return sizes[-1]

    monkeypatch.setattr("embedder.doctor.report.check_memory", record)
    for value in ("", "int8"):
        monkeypatch.setenv("EMBEDDER_WEIGHTS", value)
        assert doctor.main(["--port", "0"]) == 0
        reports.append(rows_of(capsys.readouterr().out))
    assert "8 bits" not in reports[0]
    assert reports[1]["8 bits"] == ("ok", "int8")
    assert sizes[1] < 0.8 * sizes[0]


def test_model_that_is_not_here_yet_is_no_fault(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert doctor.main(["no-such-owner/no-such-model", "--port", "0"]) == 0
    assert "the service downloads it at its first start" in rows_of(capsys.readouterr().out)["model"][1]


def test_each_model_has_its_own_data_type(
    random_reranker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled ones stay in float32 on a processor that multiplies bfloat16."""
    monkeypatch.setattr("embedder.model.devices.cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setenv("EMBEDDER_MODEL", "bundled")
    monkeypatch.setenv("EMBEDDER_DEVICE", "cpu")
    for name, found in ((str(random_reranker), "float32 and bfloat16"), ("bundled", "float32")):
        monkeypatch.setattr("embedder.model.checkpoint.BUNDLED_RERANKER", random_reranker)
        monkeypatch.setenv("EMBEDDER_RERANKER", name)
        assert doctor.main(["--port", "0"]) == 0
        assert rows_of(capsys.readouterr().out)["data type"][1] == found


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11422654\n")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs")


def change_config(folder: Path, key: str, value: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("model", break_config),
        ("tokenizer", break_tokenizer),
        ("weights", break_weights),
        ("weights", lambda folder: change_config(folder, "num_hidden_layers", 40)),
        ("weights", lambda folder: change_config(folder, "intermediate_size", 64)),
    ],
    ids=["config", "tokenizer", "weights", "layers", "shapes"],
)
def test_broken_file_of_a_checkpoint_is_named(
    name: str,
    breaks: Callable[[Path], None],
    random_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    breaks(folder)
    assert doctor.main([str(folder), "--port", "0"]) == 1
    output = capsys.readouterr().out
    assert "The service would not start: 1 of " in output
    assert [found for found, (verdict, _) in rows_of(output).items() if verdict == "FAILED"] == [name]
    assert str(folder) in rows_of(output)[name][1]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("prompt", "chat_template.jinja"),
        ("images", "preprocessor_config.json"),
        ("images", "video_preprocessor_config.json"),
        ("weights", "model.safetensors"),
    ],
)
def test_link_without_its_file_does_not_count_as_no_file(
    name: str, file: str, random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a copy of the hub's cache without its blobs."""
    path = shutil.copytree(random_checkpoint, tmp_path / "checkpoint") / file
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/0")
    assert doctor.main([str(path.parent), "--port", "0"]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert [found for found, (verdict, _) in rows.items() if verdict == "FAILED"] == [name]
    assert rows[name][1].startswith(f"cannot read {path}: ")


def test_tokenizer_of_another_checkpoint_is_found(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service finds it too, before a request has a token without an embedding."""
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["an entry of a larger vocabulary"] = 1_000_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert doctor.main([str(folder), "--port", "0"]) == 1
    verdict, text = rows_of(capsys.readouterr().out)["tokenizer"]
    assert (verdict, "tokenizer.json" in text, "vocab_size" in text) == ("FAILED", True, True)
    with pytest.raises(ModelUnavailable, match="; allowed: less than"):
        Models(Settings(model=str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"MAX_ITMES": "5"}, "settings"),
        ({"API_KEY_FILE": "/no/such/file"}, "API keys"),
        ({"MODEL": "./no-such-folder"}, "model"),
        ({"BATCH_FOLDER": "/dev/null/batches"}, "batches"),
        ({"DEMO_FOLDER": "/no/such/folder"}, "playground"),
        ({"DEVICE": "cuda:99"}, "device"),
        ({"ATTENTION": "varlen", "DEVICE": "cpu"}, "attention"),
        ({"EXECUTION": "graphs", "DEVICE": "cpu"}, "execution"),
        ({"WEIGHTS": "fp8", "DEVICE": "cpu"}, "8 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_setting_that_stops_a_start_is_found(
    variables: dict[str, str], name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(f"EMBEDDER_{variable}", value)
    assert doctor.main(["--port", "0"]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert [found for found, (verdict, _) in rows.items() if verdict == "FAILED"] == [name]
    assert rows["port"][0] == "ok"  # what does not depend on the fault is checked too


def test_taken_port_is_found(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--host", "127.0.0.1", "--port", str(port)]) == 1
    verdict, text = rows_of(capsys.readouterr().out)["port"]
    assert (verdict, text) == ("FAILED", f"cannot listen on 127.0.0.1, port {port}: Address already in use")


def test_no_key_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_API_KEY", "s3cret")
    assert doctor.main(["--port", "0"]) == 0
    output = capsys.readouterr().out
    assert "s3cret" not in output
    assert rows_of(output)["API keys"] == ("ok", "required")
