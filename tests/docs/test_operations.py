"""What an operator sees when something goes wrong is what the troubleshooting page shows, but for names and numbers."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from embedder.engine.engine import Engine
from embedder.errors import InvalidMedia, MediaTooLarge, ModelUnavailable, Overloaded
from embedder.http.api_keys import ApiKeys
from embedder.inputs.decoder_process import DecoderProcess
from embedder.loaded_model import EmbeddingModel
from embedder.model import speed
from embedder.model.checkpoint import find_checkpoint
from embedder.models import Models
from embedder.server.lifecycle import check_address
from embedder.settings import Settings
from tests.conftest import ROOT, start_server
from tests.docs.markdown import blocks
from tests.docs.test_pages import SOURCES, has_in_order
from tests.fake_model import FakeModel, busy_device, item, running, wait_until
from tests.inputs.killed import kill_at

PAGE = ROOT / "docs" / "operations" / "troubleshooting.md"
MONITORING = ROOT / "docs" / "operations" / "monitoring.md"


def pattern(line: str) -> str:
    """A line with its paths, quoted names, numbers and times replaced."""
    line = re.sub(r"(/[\w.-]+)+", "PATH", line)
    line = re.sub(r"'[^']*'", "NAME", line)
    return re.sub(r"\d+(\.\d+)?", "N", line)


def shown(mark: str) -> set[str]:
    lines = [line for block in blocks(PAGE) if block.mark == mark for line in block.text.splitlines()]
    return set(map(pattern, lines))


def broken(checkpoint: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    copy = shutil.copytree(checkpoint, folder / "checkpoint")
    change(copy)
    return copy


def make_llama(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def add_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = 1_000_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change", [make_llama, add_token])
def test_wrong_checkpoint(change: Callable[[Path], None], random_checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(broken(random_checkpoint, tmp_path, change)), device="cpu")
    with pytest.raises(ModelUnavailable) as raised:
        Models(settings)
    assert pattern(f"the service does not start: {raised.value}") in shown("log")


HUB_ID = "Qwen/Qwen3-VL-Embedding-8B"  # on the page


def start() -> None:
    """What the service does before it loads the model."""
    settings = Settings.from_environment()
    ApiKeys(settings)
    find_checkpoint(settings)


@pytest.mark.parametrize(
    "variables",
    [
        {"MODLE": "x"},
        {"MODEL": "/models/no-such-folder"},
        {"MODEL": "no-such-owner/no-such-model"},
        {"API_KEY": ""},
        {"API_KEY_FILE": "{keys}"},
        {"MAX_INPUT_TOKENS": "32768"},
    ],
    ids=str,
)
def test_setting_that_stops_a_start(variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n")
    for name, value in variables.items():
        monkeypatch.setenv(f"EMBEDDER_{name}", value.format(keys=keys))
    with pytest.raises((ValueError, ModelUnavailable)) as raised:
        start()
    line = pattern(f"the service does not start: {raised.value}".replace("no-such-owner/no-such-model", HUB_ID))
    if "MODLE" in variables:  # the page shows the first of the known settings
        line = ", ".join(line.split(", ")[:2])
    assert line.replace("LocalEntryNotFoundError", "ConnectError") in shown("log")


def test_port_that_another_program_uses() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(ValueError, match="cannot listen") as raised:
        check_address("", taken.getsockname()[1])
    assert pattern(f"the service does not start: {raised.value}") in shown("log")


def test_bundled_model_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Models(Settings(device="cpu")).close()
    assert next(pattern(line) for line in caplog.messages if "small model" in line) in shown("log")


@pytest.mark.parametrize("is_killed", [False, True], ids=["late", "killed"])
def test_decoding_process_that_ends(
    is_killed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = DecoderProcess(Settings(), lambda _: None)
    process.start()
    if is_killed:
        kill_at(monkeypatch, "open")
    process.send(type="open" if is_killed else "a message that asks for nothing")
    with pytest.raises(InvalidMedia if is_killed else MediaTooLarge):
        process.receive(time.monotonic() + (60 if is_killed else 0))
    (line,) = caplog.messages
    if is_killed:
        assert line == "a decoding process is replaced: it ended with status -9"
        assert "`it ended with status -9`" in PAGE.read_text(encoding="utf-8")
    else:
        assert pattern(line) in shown("log")


def submit_many(engine: Engine) -> None:
    for index in range(1000):
        engine.submit(item(f"text {index}"))


def test_full_queue(model: FakeModel) -> None:
    with running(model, max_queued_tokens=256, max_input_tokens=64) as engine, busy_device(engine, model):
        with pytest.raises(Overloaded) as raised:
            submit_many(engine)
        assert pattern(str(raised.value)) in shown("message")


def test_slow_cpu(
    write_random: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_random({"num_hidden_layers": 6}, {"depth": 5, "deepstack_visual_indexes": [1, 2]})
    settings = Settings(model=str(folder), device="cpu")
    loaded = EmbeddingModel(find_checkpoint(settings), settings, torch.device("cpu"))
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(speed.time, clock, map(float, range(0, 10**9, 10**6)).__next__)
    with caplog.at_level(logging.WARNING):
        speed.warn_if_slow(loaded.forward, loaded.preprocessor)
    assert pattern(caplog.messages[0]) in shown("log")


def logged_messages() -> Iterator[str]:
    """The message of each warning and error that the code logs."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_logger = ast.unparse(node.func.value) == "logger"
            if is_logger and node.func.attr in ("warning", "error", "exception", "critical"):
                yield str(ast.literal_eval(node.args[0]))
            elif node.func.attr == "log_error":  # of a job, with the logger first
                yield str(ast.literal_eval(node.args[1]))


def test_every_warning_and_error_has_an_entry() -> None:
    entries = [line for block in blocks(PAGE) if block.mark == "log" for line in block.text.splitlines()]
    messages = set(logged_messages())
    assert len(messages) > 30
    missing = {
        message
        for message in messages
        if not any(has_in_order(line, re.split(r"%[a-z.0-9]+", message)) for line in entries)
    }
    assert not missing


def test_every_alert_has_a_row_that_says_what_to_read() -> None:
    alerts = re.findall(r"alert: (\w+)", (ROOT / "deploy" / "alerts.yaml").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)` \| .*\.md#", MONITORING.read_text(encoding="utf-8"), re.MULTILINE)
    assert alerts
    assert rows == alerts


@pytest.mark.slow
def test_killed_worker(random_checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu")
    try:
        (worker,) = server.workers
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: "was killed by signal 9" in server.log.read_text())
    finally:
        assert server.stop() == 0
    (line,) = [line for line in server.log.read_text().splitlines() if "was killed by signal 9" in line]
    assert any(pattern(line).endswith(known) for known in shown("log") if "was killed by signal" in known)


@pytest.mark.slow
def test_service_with_a_wrong_checkpoint(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = broken(random_checkpoint, tmp_path, make_llama)
    environment = os.environ | {"EMBEDDER_MODEL": str(folder), "BENTOML_DO_NOT_TRACK": "True"}
    command = [Path(sys.executable).with_name("bentoml"), "serve", "--port", "0"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert pattern((run.stdout + run.stderr).strip().splitlines()[-1]) in shown("log")
