"""Checkpoints, pictures and services that several tests need."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import httpx
import hypothesis
import numpy as np
import PIL.Image
import pillow_heif
import pytest
from numpy.typing import NDArray

if TYPE_CHECKING:  # see `pytest_collection`
    from selenium import webdriver
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

    from embedder import Embedder, Reranker
    from tests.fake_model import FakeModel

# the same examples in every run, and no folder that remembers them
hypothesis.settings.register_profile("house", database=None, derandomize=True, deadline=None)
hypothesis.settings.load_profile("house")

# torch compiles in this process. The ones that it would start may take a minute to notice that the tests have ended.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Each HTTP client reads 140 certificates, which takes 45 ms of CPU time. No test needs them, so they are read once.
ssl.create_default_context = functools.cache(ssl.create_default_context)

ROOT = Path(__file__).parents[1]
TEXTS = list(topics.values())  # the text of Python's own help: English that every installation has


IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # a process of `pytest -n`
RUN = os.environ["EMBEDDING_TESTS_RUN"] if IS_XDIST_WORKER else f"{os.getpid()}-{time.time_ns()}"
os.environ["EMBEDDING_TESTS_RUN"] = RUN  # every process that a test starts inherits it


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fail the run, and end the processes, if any that a test has started is still there after 30 s."""
    yield  # fixtures and the processes of `pytest -n` end
    if not IS_XDIST_WORKER:
        deadline = time.monotonic() + 30  # Ray's agents take some seconds to notice that their parent has ended
        while (left := processes_of_this_run()) and time.monotonic() < deadline:
            time.sleep(0.5)
        for pid, command in left.items():
            print(f"\nstill running after the tests: {pid} {command}", file=sys.stderr)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def processes_of_this_run() -> dict[int, str]:
    """Ids and commands of running processes that the tests started; zombies are left out."""
    mark = f"EMBEDDING_TESTS_RUN={RUN}\0".encode()
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if mark in (path / "environ").read_bytes() and path.name != str(os.getpid()):
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command and "multiprocessing.resource_tracker" not in command:  # ends with this process
                    found[int(path.name)] = command[:200]
    return found


def pytest_collection(session: pytest.Session) -> None:
    """Before any test file imports transformers, declare what it needs.

    The process of `pytest -n` that runs no test is spared the seconds that this takes, and the fixtures import what
    they need when they run.
    """
    if IS_XDIST_WORKER or not session.config.getoption("numprocesses", None):
        from embedder.torchvision_shim import declare_torchvision_operators

        declare_torchvision_operators()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """With `--dist loadfile`, run the files that share a server in one process, so that it is started once."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadServerScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return shared_server(file) or file

    return LoadServerScheduling(config, log)


@functools.cache
def shared_server(file: str) -> str | None:
    """The fixture for a server that the tests of a file use, if any."""
    uses = re.findall(r"\b(small_server|server|client): (?:Server|httpx.Client)\b", (ROOT / file).read_text("utf-8"))
    return "small_server" if "small_server" in uses else "server" if uses else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that have only slow tests, if those do not run: their imports take seconds."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") or None


def pytest_make_parametrize_id(val: object) -> str | None:
    """Leave bytes out of test ids: those of gzip and PDF have the time, and the processes of `pytest -n` must agree."""
    return "bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none. Two tests with one id are an error: xdist would run one."""
    import torch

    repeated = [node_id for node_id, times in Counter(item.nodeid for item in items).items() if times > 1]
    if repeated:
        raise pytest.UsageError(f"tests with the same id: {', '.join(repeated)}")

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def write_random(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a random checkpoint of the `tiny` shape with fields overridden -> its folder."""
    from benchmarks.random_checkpoint import build_tokenizer, shape_config, write_checkpoint

    tokenizer = build_tokenizer(TEXTS[:40], vocab_size=1500)

    def write(
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        tied: bool = True,
        **options: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        config = shape_config("tiny", tokenizer, text=text, vision=vision, tie_word_embeddings=tied)
        write_checkpoint(folder, config, tokenizer, **options)
        return folder

    return write


@pytest.fixture(scope="session")
def random_checkpoint(write_random: Callable[..., Path]) -> Path:
    """One random checkpoint for tests that need any."""
    return write_random()


@pytest.fixture(scope="session", autouse=True)
def float32_on_every_processor() -> Iterator[None]:
    """The default data type of a processor without bfloat16, so that vectors are compared in float32 everywhere."""
    import torch

    capabilities = {**torch.cpu.get_capabilities(), "avx512_bf16": False, "amx_bf16": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        yield


@pytest.fixture(scope="session")
def write_reranker(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a random reranker of the `tiny` shape -> its folder."""
    from benchmarks.random_checkpoint import build_reranker_tokenizer, shape_config, write_checkpoint

    tokenizer = build_reranker_tokenizer(TEXTS[:40], vocab_size=1500)

    def write(tied: bool = True, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("judge")
        config = shape_config("tiny", tokenizer, tie_word_embeddings=tied)
        write_checkpoint(folder, config, tokenizer, seed=1, is_reranker=True, **options)
        return folder

    return write


@pytest.fixture(scope="session")
def random_reranker(write_reranker: Callable[..., Path]) -> Path:
    """One random reranker, with a head of its own, for tests that need any."""
    return write_reranker(tied=False)


@pytest.fixture(scope="session")
def reranker(random_reranker: Path) -> Iterator[Reranker]:
    """Random weights, float32, CPU."""
    from embedder import Reranker

    with Reranker(str(random_reranker), device="cpu") as reranker:
        yield reranker


@pytest.fixture(scope="session")
def embedder(random_checkpoint: Path) -> Iterator[Embedder]:
    """Random weights, float32, CPU."""
    from embedder import Embedder

    with Embedder(str(random_checkpoint), device="cpu") as embedder:
        yield embedder


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Smooth colors with some detail, different for each seed."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BILINEAR)


def encoded(image: PIL.Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """The image as the bytes of a file."""
    buffer = io.BytesIO()
    if file_format == "HEIF":  # not registered in Pillow, where it would replace the decoder of the service
        pillow_heif.from_pillow(image).save(buffer, **options)
    else:
        image.save(buffer, file_format, **options)
    return buffer.getvalue()


def finish(row: NDArray[np.float32], dimensions: int | None, *, normalize: bool) -> NDArray[np.float32]:
    """One finite row, as the engine finishes it."""
    from embedder.engine.postprocess import finish_vectors
    from embedder.errors import EngineFailed

    (vector,) = finish_vectors(row[None], [(dimensions, normalize)])
    assert not isinstance(vector, EngineFailed)
    return vector


VOCABULARY = sorted(set(" ".join(TEXTS[:40]).split()))


def words(count: int, seed: int = 0) -> str:
    """`count` English words."""
    return " ".join(random.Random(seed).choices(VOCABULARY, k=count))


@dataclass
class Server:
    """A running service. `log` is the file with all it has printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def workers(self) -> list[int]:
        """Their process ids."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if _is_worker(pid)]

    def stop(self) -> int:
        """Send SIGTERM; its exit status. A service that does not end is killed, workers and all."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


def _is_worker(pid: str) -> bool:
    try:
        return b"_bentoml_impl.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since the children were listed
        return False


def start_server(folder: Path, *, target: str = ".", cwd: Path = ROOT, **settings: str) -> Server:
    """`bentoml serve` on a free port, ready, with `EMBEDDER_<NAME>` settings.

    It computes in float32 unless `dtype` is set, because on some processors `auto` is bfloat16.

    Tries another port if a different process takes the free one before the service listens on it.
    """
    settings.setdefault("dtype", "float32")
    for _ in range(3):
        server = _start_server(folder, target, cwd, settings)
        if server.process.poll() is None:
            return server
        if "Address already in use" not in server.log.read_text():
            break
    raise AssertionError(f"the service did not become ready:\n{server.log.read_text()}")


def _start_server(folder: Path, target: str, cwd: Path, settings: Mapping[str, str]) -> Server:
    """The service, once it is ready or has exited."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
    environment |= {f"EMBEDDER_{name.upper()}": value for name, value in settings.items()}
    environment |= {"BENTOML_DO_NOT_TRACK": "True", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("BENTOML_HOME", str(folder / "bentoml"))
    log = folder / f"server-{port}.log"
    bentoml = Path(sys.executable).parent / "bentoml"
    command = [str(bentoml), "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    if setpriv := shutil.which("setpriv"):  # SIGTERM when the process of the tests ends, however it ends
        command = [setpriv, "--pdeathsig", "TERM", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/readyz", timeout=2).status_code == 200:
                return server
        time.sleep(0.2)
    process.terminate()  # a kill would leave its worker running
    process.wait(60)
    return server


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """For `parametrize`: all values; those that are not `fast` are for the slow run."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="session")
def server(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with the same random weights as `embedder`."""
    server = start_server(tmp_path_factory.mktemp("server"), model=str(random_checkpoint), device="cpu")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def reranking_server(
    random_checkpoint: Path, random_reranker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The service with the same random weights as `embedder` and `reranker`. For slow tests."""
    folder, models = tmp_path_factory.mktemp("server"), {"model": random_checkpoint, "reranker": random_reranker}
    server = start_server(folder, device="cpu", **{name: str(one) for name, one in models.items()})
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with the model of the package, its drawings, and OpenAI's batches."""
    folder = tmp_path_factory.mktemp("server")
    server = start_server(folder, batch_folder=str(folder / "batches"))
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def bundled_pair_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with both models of the package, and its drawings."""
    server = start_server(tmp_path_factory.mktemp("server"), model="bundled", reranker="bundled", device="cpu")
    yield server
    assert server.stop() == 0


@pytest.fixture
def model() -> FakeModel:
    """A fake model that does not wait."""
    from tests.fake_model import FakeModel

    model = FakeModel()
    model.gate.set()
    return model


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """An HTTP client of the service."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile."""
    from tests.playground.browser import open_chromium

    with open_chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
