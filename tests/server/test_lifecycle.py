"""Starts that fail, stops under load, and workers that are killed, with a real `bentoml serve`."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from circus.arbiter import Arbiter
from circus.sighandler import SysHandler
from circus.watcher import Watcher

from embedder.http.drain import Drain
from embedder.server.lifecycle import (
    IGNORED,
    drain_at_sigterm,
    handle_signals,
    replace_dead_workers_at_once,
    worker_server,
)
from tests.conftest import ROOT, Server, start_server

NUM_CLIENTS = 6
BODY = b'{"input": ["red", "green"]}'
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def serve(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`bentoml serve` that is expected to end by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
    environment |= {f"EMBEDDER_{name.upper()}": value for name, value in settings.items()}
    (folder / "temporary").mkdir(exist_ok=True)
    environment |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(folder / "bentoml")}
    environment |= {"TMPDIR": str(folder / "temporary")}
    command = [str(Path(sys.executable).parent / "bentoml"), "serve", "--host", "127.0.0.1", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def without_its_end(checkpoint: Path, folder: Path) -> Path:
    """A copy whose download stopped early."""
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[:-1000] if path.suffix == ".safetensors" else data)
    return folder


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "fault",
    [
        "model",
        *(
            pytest.param(fault, marks=SLOW)
            for fault in ("variable", "usual port", "key file", "port", "device", "weights", "batch folder")
        ),
    ],
)
def test_start_that_fails_ends_with_one_line(fault: str, random_checkpoint: Path, tmp_path: Path) -> None:
    settings, reason = {"model": str(random_checkpoint), "device": "cpu"}, ""
    options: list[str] = ["--port", "0"]
    with contextlib.ExitStack() as listeners:
        match fault:
            case "variable":
                settings, reason = {"max_itmes": "5"}, "unknown settings: EMBEDDER_MAX_ITMES; known are: "
            case "key file":
                settings["api_key_file"] = str(tmp_path / "keys")
                reason = f"EMBEDDER_API_KEY_FILE='{tmp_path}/keys' cannot be read: No such file or directory"
            case "model":
                settings["model"] = "./no-such-folder"
                reason = "EMBEDDER_MODEL='./no-such-folder' is neither a folder nor a hub id"
            case "port" | "usual port":
                port = 0 if fault == "port" else 3000
                with contextlib.suppress(OSError):  # another process listens on the usual port
                    taken = listeners.enter_context(socket.create_server(("127.0.0.1", port)))
                    port = taken.getsockname()[1]
                options = ["--port", str(port)] if fault == "port" else []
                reason = f"cannot listen on 127.0.0.1, port {port}: Address already in use"
            case "device":
                settings["device"], reason = "cuda:99", "EMBEDDER_DEVICE='cuda:99', but torch "
            case "batch folder":
                settings["batch_folder"] = "/dev/null/batches"
                reason = "EMBEDDER_BATCH_FOLDER='/dev/null/batches' cannot be used: "
            case "weights":
                settings["model"] = str(without_its_end(random_checkpoint, tmp_path))
                reason = f"cannot read {tmp_path}/model.safetensors: "
        run = serve(tmp_path, *options, **settings)
    output = run.stdout + run.stderr
    assert run.returncode == 1, output
    assert [line for line in output.splitlines() if f"the service does not start: {reason}" in line], output
    assert "Traceback" not in output
    assert "a new one starts" not in output
    assert not list((tmp_path / "temporary").glob("*metrics*"))


def test_start_at_the_limit_on_threads_ends_with_one_line() -> None:
    program = """
import threading
import bentoml
from embedder.server.lifecycle import failing_start
bentoml.server_context.worker_index = 1
threading.stack_size(2**47)  # more than any system has
with failing_start():
    threading.Thread(target=print).start()
"""
    command = ["sh", "-c", 'trap "" VTALRM; "$@"; exit $?', "sh", sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    reason = "the service does not start: a limit of the system is reached: can't start new thread"
    assert run.returncode == 1
    assert run.stderr.endswith(f"{reason}\n")
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"model": "./no-such-folder"}, {"max_itmes": "5"}, {"device": "cuda:99"}])
def test_start_that_fails_is_a_line_of_json_too(settings: dict[str, str], tmp_path: Path) -> None:
    run = serve(tmp_path, "--port", "0", **settings, log_format="json")
    lines = [json.loads(line) for line in (run.stdout + run.stderr).splitlines()]
    assert run.returncode == 1
    failures = [line["message"] for line in lines if line["message"].startswith("the service does not start: ")]
    assert len(failures) == 1
    assert {"time", "level", "logger", "message"} <= set(lines[-1])


@pytest.fixture
def lone(
    request: pytest.FixtureRequest, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A service for one test, with environment variables from the parameter. It is killed at the end."""
    for name, value in getattr(request, "param", {}).items():
        monkeypatch.setenv(name, value)
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu")
    yield server
    server.process.kill()  # its worker notices and exits
    server.process.wait(10)


@pytest.mark.parametrize(("request_s", "least_s", "most_s"), [(0.1, 0.1, 0.3), (5.0, 0.5, 0.9)])
def test_server_is_stopped_when_no_request_is_left_or_the_time_is_over(
    request_s: float, least_s: float, most_s: float
) -> None:
    drain = Drain()

    async def stopped_after_s() -> float:
        server = uvicorn.Server(uvicorn.Config(app="none"))
        signal.signal(signal.SIGTERM, server.handle_exit)
        drain_at_sigterm(drain, worker_server(), 0.5)

        async def answer() -> None:
            with drain:
                await asyncio.sleep(request_s)

        request = asyncio.create_task(answer())
        await asyncio.sleep(0)
        start = time.monotonic()
        signal.raise_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while not server.should_exit:
                await asyncio.sleep(0.01)
        request.cancel()
        return time.monotonic() - start

    usual = signal.getsignal(signal.SIGTERM)
    try:
        assert least_s <= asyncio.run(stopped_after_s()) < most_s
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert drain.is_draining


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def requests_in_progress(server: Server) -> int:
    """Number of requests in progress, without the one that asks."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    (line,) = [line for line in text.splitlines() if line.startswith("embedder_requests_in_progress ")]
    return int(float(line.rpartition(" ")[2])) - 1


def half_sent(server: Server) -> list[http.client.HTTPConnection]:
    """Accepted requests with incomplete bodies: in progress until the test sends the rest."""
    connections = []
    for _ in range(NUM_CLIENTS):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.putrequest("POST", "/txt/embed")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(len(BODY)))
        connection.endheaders(BODY[:5])
        connections.append(connection)
    wait_for(lambda: requests_in_progress(server) == NUM_CLIENTS, 60)
    return connections


def finish(connection: http.client.HTTPConnection) -> tuple[int, int, str | None]:
    """Send the rest. Returns status, number of vectors, and the header `connection` of the response."""
    connection.send(BODY[5:])
    answer = connection.getresponse()
    return answer.status, len(json.loads(answer.read())["embedding"]), answer.getheader("connection")


def test_after_sigterm_accepted_requests_finish_and_new_ones_are_refused(lone: Server) -> None:
    url = f"{lone.url}/v1/embeddings"
    with httpx.Client(timeout=60) as kept_alive:
        assert "connection" not in kept_alive.get(f"{lone.url}/readyz").headers
        taken = half_sent(lone)
        lone.process.terminate()
        wait_for(lambda: httpx.get(f"{lone.url}/readyz", timeout=60).status_code == 503, 20)
        for refused in (
            kept_alive.post(url, json={"input": "late"}),
            httpx.post(url, json={"input": "later"}, timeout=60),
        ):
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{lone.url}/livez", timeout=60).status_code == 200
    assert [finish(connection) for connection in taken] == [(200, 2, "close")] * NUM_CLIENTS
    assert lone.process.wait(60) == 0
    assert "Traceback" not in lone.log.read_text()


@pytest.mark.slow
def test_sigterm_under_load_leaves_no_request_without_an_outcome(lone: Server) -> None:
    """Each request gets a response or a 503, or its connection is closed."""

    def ask_until_refused() -> list[object]:
        outcomes: list[object] = []
        with httpx.Client(base_url=lone.url, timeout=60) as client:
            while outcomes[-1:] in ([], [200]):
                try:
                    outcomes.append(client.post("/txt/embed", json={"input": "red"}).status_code)
                except httpx.TimeoutException:
                    raise
                except httpx.TransportError as error:
                    outcomes.append(error)
        return outcomes

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(ask_until_refused) for _ in range(16)]
        time.sleep(2)
        lone.process.terminate()
        last = [client.result()[-1] for client in clients]
    assert all(outcome == 503 or isinstance(outcome, httpx.TransportError) for outcome in last), last
    assert lone.process.wait(60) == 0


@pytest.mark.slow
def test_unread_responses_do_not_delay_the_stop(random_checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu", request_timeout_s="1")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setblocking(False)
        request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
        with contextlib.suppress(BlockingIOError):
            connection.sendall(request * 400)
        time.sleep(1)
        server.process.terminate()
        assert server.process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime: Debian's package faketime")
def test_clock_jump_loses_no_response(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day forward and back during requests: none hangs, and none times out."""
    shift = tmp_path / "shift"
    shift.write_text("+0")
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(shift))
    monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu")
    monkeypatch.delenv("LD_PRELOAD")
    bodies = {
        "/txt/embed": {"input": "red"},
        "/embed_texts": {"texts": [{"text": "red"}]},
    }  # BentoML batches the second
    days = set[str]()
    is_over = threading.Event()

    def ask(path: str) -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not is_over.is_set():
                answer = client.post(path, json=bodies[path])
                assert answer.status_code == 200, answer.text
                days.add(answer.headers["date"][:16])

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask, path) for path in (*bodies, *bodies)]
        try:
            for seen, jump in enumerate(("+0", "+1d", "-1d"), 1):
                shift.write_text(jump)
                wait_for(lambda seen=seen: len(days) == seen or any(client.done() for client in clients), 60)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    assert server.stop() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_loses_no_response(
    random_checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is on the same disk: log lines are lost, requests are not."""
    for name in ("TMPDIR", "BENTOML_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(small_disk))
    server = start_server(small_disk, model=str(random_checkpoint), device="cpu")
    try:
        fill(small_disk)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for _ in range(30):
                for path, body in {
                    "/txt/embed": {"input": "red"},
                    "/embed_texts": {"texts": [{"text": "red"}]},
                }.items():
                    assert client.post(path, json=body).status_code == 200
                assert client.post("/embed", json={"items": []}).status_code == 400
                assert client.get("/nosuch").status_code == 404
            assert 'embedder_requests_total{route="other",status="404"}' in client.get("/metrics").text
            assert client.get("/readyz").status_code == 200
    finally:
        status = server.stop()
    assert status == 0


def fill(folder: Path) -> None:
    """Write until the file system is full."""
    with (folder / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(4096))


ARBITER = """
from circus import get_arbiter
from embedder.server.lifecycle import handle_signals

{prepare}
arbiter = get_arbiter([{{"cmd": "sleep 60", "numprocesses": 2, "warmup_delay": 2}}])
print("starting", flush=True)
arbiter.start()
"""


@pytest.mark.parametrize("prepare", ["handle_signals()", "pass  # circus itself loses the signal"])
@pytest.mark.slow
def test_busy_arbiter_stops_after_it_has_started_the_workers(prepare: str) -> None:
    command = [sys.executable, "-c", ARBITER.format(prepare=prepare)]
    arbiter = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert arbiter.stdout
        arbiter.stdout.readline()
        time.sleep(1)  # of the four seconds in which it starts them
        arbiter.terminate()
        if prepare.startswith("handle"):
            assert arbiter.wait(15) == 0
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                arbiter.wait(8)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(arbiter.pid, signal.SIGKILL)
        arbiter.wait()
        arbiter.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lone", [{}, {"BENTOML_CONTAINERIZED": "true"}], ids=["elsewhere", "in a container"], indirect=True
)
def test_killed_worker_fails_its_requests_at_once(lone: Server) -> None:
    """Then BentoML starts another worker; in a container it exits, and the container's supervisor acts."""
    taken, (worker,) = half_sent(lone), lone.workers
    os.kill(worker, signal.SIGKILL)
    for connection in taken:
        connection.sock.settimeout(5)
        with pytest.raises(ConnectionError):
            finish(connection)
    if "BENTOML_CONTAINERIZED" in os.environ:
        assert lone.process.wait(120) == 1
        return
    assert httpx.post(f"{lone.url}/txt/embed", json={"input": "red"}, timeout=200).status_code == 200
    assert lone.stop() == 0
    (line,) = [line for line in lone.log.read_text().splitlines() if "[ERROR]" in line]
    assert line.endswith(
        f"a worker (process {worker}) was killed by signal 9 (out of memory? see the kernel's log); a new one starts"
    )


def test_signals_that_would_end_other_programs_are_logged_and_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    previous = {signum: signal.getsignal(signum) for signum in IGNORED}
    for name in ("quit", "reload"):
        monkeypatch.setattr(SysHandler, name, getattr(SysHandler, name))
    handler: Any = SysHandler.__new__(SysHandler)  # without its signal handlers, and without circus to reload
    try:
        handle_signals()
        handler.handle_hup()
        for signum in IGNORED:
            signal.raise_signal(signum)
    finally:
        for signum, action in previous.items():
            signal.signal(signum, action)
    assert caplog.messages == [
        f"{name} is ignored. To change settings, restart the service"
        for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM")
    ]


def test_look_for_dead_workers_gives_way_to_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watcher, "call_hook", Watcher.call_hook)
    monkeypatch.setattr(Arbiter, "manage_watchers", Arbiter.manage_watchers)
    busy: Any = Arbiter.__new__(Arbiter)
    busy._restarting, busy._exclusive_running_command = False, "manage_watchers"
    replace_dead_workers_at_once()

    async def look() -> None:
        await busy.manage_watchers()

    asyncio.run(look())  # circus itself raises ConflictError
    assert busy._exclusive_running_command == "manage_watchers"


@pytest.mark.parametrize(("hook", "respawn"), [("before_spawn", True), ("before_stop", False)])
def test_worker_that_circus_drops_without_reaping_it_is_logged(
    hook: str, respawn: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Watcher, "call_hook", lambda *_, **__: True)
    monkeypatch.setattr(Arbiter, "manage_watchers", Arbiter.manage_watchers)
    handler = signal.getsignal(signal.SIGCHLD)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    watcher: Any = Mock(processes={worker.pid: worker}, respawn=respawn)
    try:
        replace_dead_workers_at_once()
        Watcher.call_hook(watcher, "after_spawn", pid=worker.pid)
        Watcher.call_hook(watcher, hook)
        assert not caplog.records
        worker.kill()
        watcher.processes.clear()  # as `Watcher.manage_processes` does with a process that is a zombie
        Watcher.call_hook(watcher, hook)
        Watcher.call_hook(watcher, hook)
    finally:
        signal.signal(signal.SIGCHLD, handler)
        worker.wait()
    consequence = "a new one starts" if respawn else "in a container it is not replaced"
    assert [record.getMessage() for record in caplog.records] == [
        f"a worker (process {worker.pid}) was killed by signal 9 (out of memory? see the kernel's log); {consequence}"
    ]


@pytest.mark.slow
def test_every_line_of_a_start_a_kill_and_a_stop_is_json(random_checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu", log_format="json", access_log="true")
    (worker,) = server.workers
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: bool(server.workers) and server.workers != [worker], 60)
    assert httpx.post(f"{server.url}/txt/embed", json={"input": "red"}, timeout=200).status_code == 200
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    messages = [line["message"] for line in lines]
    assert sum("was killed by signal 9" in message for message in messages) == 1
    assert sum(message.startswith(f"loading {random_checkpoint}: 0.0 GB of weights") for message in messages) == 2
    assert any(line.get("route") == "/txt/embed" for line in lines)


@pytest.mark.slow
def test_worker_whose_arbiter_was_killed_finishes_its_requests_and_exits(lone: Server) -> None:
    (worker,) = lone.workers
    taken = half_sent(lone)
    lone.process.kill()
    wait_for(lambda: httpx.get(f"{lone.url}/readyz", timeout=60).status_code == 503, 20)
    assert [finish(connection) for connection in taken] == [(200, 2, "close")] * NUM_CLIENTS
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), 60)
    with socket.create_server(("127.0.0.1", httpx.URL(lone.url).port or 0)):  # the port is free again
        pass
