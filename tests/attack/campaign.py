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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from embedder.inputs.items import EXAMPLE_IMAGE
from tests.attack import bodies, connections, media
from tests.conftest import Server

KINDS: dict[str, Callable[[random.Random, int], None]] = {
    kind.__name__: kind for kind in (*connections.KINDS, *bodies.KINDS, *media.KINDS)
}
NUM_ATTACKERS = 4
QUIET: dict[str, tuple[str, str, bytes]] = {
    "probe": ("GET", "/livez", b""),
    "text": ("POST", "/txt/embed", json.dumps({"input": "red"}).encode()),
    "picture": ("POST", "/img/embed", json.dumps({"input": EXAMPLE_IMAGE}).encode()),
}
MAX_KEPT_THREADS = 40  # pools grow at first use, asyncio's to 32, and keep their threads
SETTLE_S = 30.0  # for connections, threads and processes of the attack to end


@dataclass
class Caller:
    """One quiet caller: its latencies, and everything that was not a 200."""

    name: str
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def call(self, port: int, until_s: float) -> None:
        """Send a request every 50 ms on connections of its own."""
        method, path, body = QUIET[self.name]
        while time.monotonic() < until_s:
            begin_s = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request(method, path, body, {"content-type": "application/json"})
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    self.failures.append(f"status {response.status}")
            except OSError as error:
                self.failures.append(repr(error))
            finally:
                connection.close()
            self.seconds.append(time.perf_counter() - begin_s)
            time.sleep(0.05)

    def percentile_s(self, percent: int) -> float:
        """A percentile of the latencies."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, len(self.seconds) * percent // 100)]


@dataclass(frozen=True)
class Usage:
    """What the worker and the processes that it has started use."""

    rss_mb: float
    num_threads: int
    num_files: int
    num_processes: int


def usage(server: Server) -> Usage:
    """What all workers use now."""
    pids = _descendants(server.workers)
    rss_kb = sum(int(number) for pid in pids for number in re.findall(r"VmRSS:\s+(\d+)", _read(pid, "status")))
    count = [sum(_count(pid, folder) for pid in pids) for folder in ("task", "fd")]
    return Usage(rss_kb / 1024, count[0], count[1], len(pids))


def _descendants(pids: list[int]) -> list[int]:
    children = [int(child) for pid in pids for child in _read(pid, f"task/{pid}/children").split()]
    return pids + (_descendants(children) if children else [])


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:  # it has ended
        return ""


def _count(pid: int, folder: str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/{folder}"))
    except OSError:
        return 0


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
        return [*rows, f"gauges after: {self.gauges}"]

    def slowdown(self, name: str) -> float:
        """By how much the 99th percentile of a quiet caller has grown."""
        return self.attacked[name].percentile_s(99) / self.quiet[name].percentile_s(99)

    def faults(self) -> list[str]:
        """What must not be, on any machine."""
        found = [f"{caller.name}: {caller.failures[:3]}" for caller in self.attacked.values() if caller.failures]
        found += [f"{name} is {value}" for name, value in self.gauges.items() if value]
        if self.after.num_files > self.before.num_files + 10:
            found.append(f"files: {self.before.num_files} -> {self.after.num_files}")
        if self.after.num_processes > self.before.num_processes:
            found.append(f"processes: {self.before.num_processes} -> {self.after.num_processes}")
        if self.after.num_threads > self.before.num_threads + MAX_KEPT_THREADS:
            found.append(f"threads: {self.before.num_threads} -> {self.after.num_threads}")
        return found


def attack(port: int, seconds: float, seed: int, names: list[str], counts: multiprocessing.Queue[str]) -> None:
    """Run random attacks of these names in threads of this process. `counts`: gets the name of each."""
    os.nice(10)  # it shares the machine with what it measures
    until_s = time.monotonic() + seconds

    def run(index: int) -> None:
        draw = random.Random(f"{seed} {index}")
        while time.monotonic() < until_s:
            name = draw.choice(names)
            with contextlib.suppress(OSError, http.client.HTTPException):  # a refusal, a reset, a time-out
                KINDS[name](draw, port)
            counts.put(name)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(NUM_ATTACKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(server: Server, *, seconds: float, seed: int, only: list[str] | None = None) -> Report:
    """Measure quiet callers for a fifth of the time, then next to attacks. `only`: names of their kinds."""
    port = int(server.url.rpartition(":")[2])
    quiet = _measure(port, max(3.0, seconds / 5))
    before = usage(server)
    context = multiprocessing.get_context("fork")  # a new interpreter would import torch again
    counts: multiprocessing.Queue[str] = context.Queue()
    attacker = context.Process(target=attack, args=(port, seconds, seed, only or list(KINDS), counts))
    attacker.start()
    names: collections.Counter[str] = collections.Counter()
    names[counts.get()] += 1  # it has begun
    peaks = [before]
    watching = threading.Event()
    watcher = threading.Thread(target=_watch, args=(server, peaks, watching))
    watcher.start()
    attacked = _measure(port, seconds)
    while attacker.is_alive() or not counts.empty():
        with contextlib.suppress(queue.Empty):
            names[counts.get(timeout=0.2)] += 1
    attacker.join()
    watching.set()
    watcher.join()
    after = _settled(server, before)
    peak = Usage(*(max(getattr(one, name) for one in peaks) for name in Usage.__dataclass_fields__))
    return Report(seed, quiet, attacked, names, before, peak, after, _gauges(port))


def _measure(port: int, seconds: float) -> dict[str, Caller]:
    callers = {name: Caller(name) for name in QUIET}
    until_s = time.monotonic() + seconds
    threads = [threading.Thread(target=caller.call, args=(port, until_s)) for caller in callers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return callers


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
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        found = {
            name: sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
            for name in names
        }
        if not any(found.values()) or time.monotonic() > until_s:
            return found
        time.sleep(0.5)
