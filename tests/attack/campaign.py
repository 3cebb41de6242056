"""Attackers in a process of their own, quiet callers in this one, and what the service takes meanwhile."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import multiprocessing
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedder.engine.media_queue import MAX_LARGE_BYTES
from embedder.engine.preprocess_workers import READY_BYTES
from embedder.http.document_pages import READERS
from embedder.inputs.decoder import THREAD_BYTES
from embedder.inputs.decoder_process import START_BYTES
from embedder.inputs.items import EXAMPLE_IMAGE
from embedder.settings import Settings
from tests.attack import bodies, connections, media
from tests.conftest import Server

KINDS: dict[str, Callable[[random.Random, int], None]] = {
    kind.__name__: kind for kind in (*connections.KINDS, *bodies.KINDS, *media.KINDS)
}
LOWEST_PRIORITY = 19
NUM_ATTACKERS = 2  # as many as the tests' machine has cores
SETTINGS = {"device": "cpu", "request_timeout_s": "10", "max_document_pages": "8"}
QUIET: dict[str, tuple[str, str, bytes]] = {
    "probe": ("GET", "/livez", b""),
    "text": ("POST", "/txt/embed", json.dumps({"input": "red"}).encode()),
    "picture": ("POST", "/img/embed", json.dumps({"input": EXAMPLE_IMAGE}).encode()),
}
PROCESS_BYTES, PRODUCTS_BYTES = 75 * 2**20, 270 * 2**20  # of the sizing guide; the others are constants of the code
TOLERANCE = 1e-5  # of a value; batches differ
TURN_S, QUIET_SHARE = 30.0, 0.25  # quiet and attacked phases alternate, since the machine may be busy in between
MAX_KEPT_PROCESSES = Settings().preprocess_threads + 1 + READERS  # they start when they are needed, and stay
FILES_PER_PROCESS = 8  # of a decoding process, and the socket to it
MAX_NEW_SERIES = 200  # routes times statuses
MAX_LOG_BYTES = 1000  # for each attack
MAX_KEPT_THREADS = 40  # pools grow at first use, asyncio's to 32, and keep their threads
SETTLE_S = 30.0  # for connections, threads and processes of the attack to end


@dataclass
class Caller:
    """One quiet caller: its latencies, and everything that was not a 200."""

    name: str
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    expected: Any = None  # the first answer

    def call(self, port: int, until_s: float) -> None:
        """Send a request every 50 ms on connections of its own."""
        method, path, body = QUIET[self.name]
        while time.monotonic() < until_s:
            begin_s = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request(method, path, body, {"content-type": "application/json"})
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200:
                    self.failures.append(f"status {response.status}")
                elif not self._is_expected(answer):
                    self.failures.append("a wrong answer")
            except OSError as error:
                self.failures.append(repr(error))
            finally:
                connection.close()
            self.seconds.append(time.perf_counter() - begin_s)
            time.sleep(0.05)

    def _is_expected(self, answer: bytes) -> bool:
        vector = json.loads(answer)["embedding"] if self.name != "probe" else [0.0]
        if self.expected is None:
            self.expected = vector
        return bool(np.abs(np.subtract(vector, self.expected)).max() < TOLERANCE)

    def percentile_s(self, percent: int) -> float:
        """A percentile of the latencies."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, len(self.seconds) * percent // 100)]


@dataclass(frozen=True)
class Usage:
    """What the service, all its processes together, uses. Memory that processes share counts in each of them."""

    rss_mb: float
    num_threads: int
    num_files: int
    num_processes: int


def usage(server: Server) -> Usage:
    """What the service uses now."""
    pids = _descendants([server.process.pid])
    rss_kb = sum(int(number) for pid in pids for number in re.findall(r"VmRSS:\s+(\d+)", _read(pid, "status")))
    count = [sum(len(_names(pid, folder)) for pid in pids) for folder in ("task", "fd")]
    return Usage(rss_kb / 1024, count[0], count[1], len(pids))


def _descendants(pids: list[int]) -> list[int]:
    tasks = [(pid, task) for pid in pids for task in _names(pid, "task")]  # each thread has children of its own
    children = [int(child) for pid, task in tasks for child in _read(pid, f"task/{task}/children").split()]
    return pids + (_descendants(children) if children else [])


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:  # it has ended
        return ""


def _names(pid: int, folder: str) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/{folder}")
    except OSError:
        return []


@dataclass
class Report:
    """What a campaign has measured."""

    seed: int
    quiet: dict[str, Caller]
    attacked: dict[str, Caller]
    attacks: collections.Counter[str]
    before: Usage
    peak: Usage
    after: Usage
    gauges: dict[str, float]
    num_series: tuple[int, int]  # of the metrics, before and after
    log_bytes: int

    def lines(self) -> list[str]:
        """The report for people."""
        rows = [f"seed {self.seed}: {sum(self.attacks.values())} attacks: {dict(sorted(self.attacks.items()))}"]
        for name, caller in self.attacked.items():
            quiet = self.quiet[name]
            rows.append(
                f"{name:8} p50 {quiet.percentile_s(50) * 1000:.0f} -> {caller.percentile_s(50) * 1000:.0f} ms, "
                f"p99 {quiet.percentile_s(99) * 1000:.0f} -> {caller.percentile_s(99) * 1000:.0f} ms "
                f"({self.slowdown(name):.1f}x), {len(caller.failures)} of {len(caller.seconds)} failed "
                f"{sorted(set(caller.failures))[:3]}"
            )
        rows += [f"{name}: {getattr(self, name)}" for name in ("before", "peak", "after")]
        rows.append(f"memory: {self.peak.rss_mb:.0f} MB at most; by the sizing guide: {self.sized_mb():.0f} MB")
        rows.append(f"gauges after: {self.gauges}; series of metrics: {self.num_series[0]} -> {self.num_series[1]}")
        return [*rows, f"log: {self.log_bytes} bytes"]

    def sized_mb(self) -> float:
        """Memory by docs/operations/sizing.md: what the service takes without work, and each row of the table."""
        settings = Settings()
        threads = settings.preprocess_threads * THREAD_BYTES
        processes = (settings.preprocess_threads + 1) * (START_BYTES + PROCESS_BYTES)
        rows = settings.max_held_bytes + threads + processes + MAX_LARGE_BYTES + READY_BYTES + PRODUCTS_BYTES
        return self.before.rss_mb + rows / 2**20

    def slowdown(self, name: str) -> float:
        """By how much the 99th percentile of a quiet caller has grown."""
        return self.attacked[name].percentile_s(99) / self.quiet[name].percentile_s(99)

    def faults(self) -> list[str]:
        """What must not be, on any machine."""
        found = [f"{caller.name}: {caller.failures[:3]}" for caller in self.attacked.values() if caller.failures]
        found += [f"{name} is {value}" for name, value in self.gauges.items() if value]
        if self.peak.rss_mb > self.sized_mb():
            found.append(f"memory: {self.peak.rss_mb:.0f} MB; allowed: {self.sized_mb():.0f} MB")
        num_started = max(0, self.after.num_processes - self.before.num_processes)
        if self.after.num_files > self.before.num_files + 10 + num_started * FILES_PER_PROCESS:
            found.append(f"files: {self.before.num_files} -> {self.after.num_files}")
        if self.after.num_processes > self.before.num_processes + MAX_KEPT_PROCESSES:
            found.append(f"processes: {self.before.num_processes} -> {self.after.num_processes}")
        if self.after.num_threads > self.before.num_threads + MAX_KEPT_THREADS:
            found.append(f"threads: {self.before.num_threads} -> {self.after.num_threads}")
        if self.num_series[1] > self.num_series[0] + MAX_NEW_SERIES:
            found.append(f"series of metrics: {self.num_series[0]} -> {self.num_series[1]}")
        if self.log_bytes > 2**16 + MAX_LOG_BYTES * sum(self.attacks.values()):
            found.append(f"log: {self.log_bytes} bytes for {sum(self.attacks.values())} attacks")
        return found


def attack(port: int, seconds: float, seed: str, names: list[str], counts: multiprocessing.Queue[str]) -> None:
    """Run random attacks of these names in threads of this process. `counts`: gets the name of each."""
    _yield_processor()
    until_s = time.monotonic() + seconds

    def run(index: int) -> None:
        draw = random.Random(f"{seed} {index}")
        while time.monotonic() < until_s:
            name = draw.choice(names)
            with contextlib.suppress(OSError, http.client.HTTPException):  # a refusal, a reset, a timeout
                KINDS[name](draw, port)
            counts.put(name)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(NUM_ATTACKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _yield_processor() -> None:
    """Give the service and the quiet callers precedence: attackers have machines of their own elsewhere.

    Linux compares the niceness of processes within a session only, and that of sessions with each other.
    """
    os.setsid()
    os.nice(LOWEST_PRIORITY)
    with contextlib.suppress(OSError):  # a kernel without groups of sessions
        Path("/proc/self/autogroup").write_text(str(LOWEST_PRIORITY))


def run(server: Server, *, seconds: float, seed: int, only: list[str] | None = None) -> Report:
    """Measure quiet callers for a quarter of the time, and next to attacks in the rest, in turns.

    `only`: names of the attacks' kinds.
    """
    port = int(server.url.rpartition(":")[2])
    quiet, attacked = ({name: Caller(name) for name in QUIET} for _ in range(2))
    num_turns = max(1, round(seconds / TURN_S))
    quiet_s, attacked_s = (share * seconds / num_turns for share in (QUIET_SHARE, 1 - QUIET_SHARE))
    names: collections.Counter[str] = collections.Counter()
    _measure(quiet, port, 1.0)
    for caller in quiet.values():
        caller.seconds.clear()  # what is needed at the first request only
        attacked[caller.name].expected = caller.expected
    before, num_series = usage(server), len(_metrics(port))
    peaks = [before]
    watching = threading.Event()
    watcher = threading.Thread(target=_watch, args=(server, peaks, watching))
    watcher.start()
    for turn in range(num_turns):
        _measure(quiet, port, quiet_s)
        with _attackers(port, attacked_s, f"{seed} {turn}", only or list(KINDS), names):
            _measure(attacked, port, attacked_s)
        _gauges(port)  # waits until nothing is in progress
    watching.set()
    watcher.join()
    after = _settled(server, before)
    peak = Usage(*(max(getattr(one, name) for one in peaks) for name in Usage.__dataclass_fields__))
    series = num_series, len(_metrics(port))
    return Report(seed, quiet, attacked, names, before, peak, after, _gauges(port), series, server.log.stat().st_size)


@contextlib.contextmanager
def _attackers(
    port: int, seconds: float, seed: str, kinds: list[str], names: collections.Counter[str]
) -> Iterator[None]:
    """Attack from another process during the block. `names`: counts the attacks."""
    context = multiprocessing.get_context("fork")  # a new interpreter would import torch again
    counts: multiprocessing.Queue[str] = context.Queue()
    attacker = context.Process(target=attack, args=(port, seconds, seed, kinds, counts))
    attacker.start()
    names[counts.get()] += 1  # it has begun
    yield
    while attacker.is_alive() or not counts.empty():
        with contextlib.suppress(queue.Empty):
            names[counts.get(timeout=0.2)] += 1
    attacker.join()


def _measure(callers: dict[str, Caller], port: int, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    threads = [threading.Thread(target=caller.call, args=(port, until_s)) for caller in callers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _watch(server: Server, peaks: list[Usage], is_over: threading.Event) -> None:
    while not is_over.wait(0.2):
        peaks.append(usage(server))


def _settled(server: Server, before: Usage) -> Usage:
    """What is used once the connections of the attack are closed, or after `SETTLE_S`."""
    until_s = time.monotonic() + SETTLE_S
    while (now := usage(server)).num_files > before.num_files + 10 and time.monotonic() < until_s:
        time.sleep(0.5)
    return now


def _gauges(port: int) -> dict[str, float]:
    """Gauges that are 0 when nothing is in progress, apart from the request for the metrics itself."""
    names = ("embedder_queue_items", "embedder_queue_tokens", "embedder_held_bytes")
    until_s = time.monotonic() + SETTLE_S
    while True:
        text = "\n".join(_metrics(port))
        found = {
            name: sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
            for name in names
        }
        if not any(found.values()) or time.monotonic() > until_s:
            return found
        time.sleep(0.5)


def _metrics(port: int) -> list[str]:
    """The lines of all series."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return [line for line in lines if not line.startswith("#")]
