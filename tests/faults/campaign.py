"""The faults, and how long each takes until the log names it and until the service answers again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import ROOT, Server, start_server
from tests.faults.callers import NUM_CALLERS, Callers

REQUEST_TIMEOUT_S, STUCK_AFTER_S = 20.0, 3.0
SLACK_S = 40.0  # a connection may wait for the start of the next worker, on few cores that 64 callers share
AFTER_BATCHES = 5
GIVE_UP_S = 85.0


class NotPossibleHere(Exception):
    """The machine does not let a test cause this fault."""


@dataclass
class Campaign:
    """A service with its own temporary folder, and its callers."""

    server: Server
    folder: Path  # TMPDIR of the service
    fault_file: Path
    callers: Callers
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def in_a_batch(self, fault: str) -> float:
        """Let the service cause the fault in a batch, and return the time at which it did."""
        injected = self.fault_file.with_suffix(".injected")
        injected.unlink(missing_ok=True)
        draft = self.fault_file.with_suffix(".draft")
        draft.write_text(f"{fault} {AFTER_BATCHES}")
        draft.rename(self.fault_file)
        _wait(injected.exists, f"no batch caused the fault {fault}")
        return float(injected.read_text())

    def kill_worker(self) -> float:
        """End the worker as the kernel does when memory is short, and return the time."""
        (worker,) = self.server.workers
        os.kill(worker, signal.SIGKILL)
        return time.monotonic()


# The faults


def device_error(campaign: Campaign) -> float:
    return campaign.in_a_batch("error")


def batch_fails(campaign: Campaign) -> float:
    return campaign.in_a_batch("batch")


def device_out_of_memory(campaign: Campaign) -> float:
    return campaign.in_a_batch("memory")


def device_hangs(campaign: Campaign) -> float:
    return campaign.in_a_batch("hang")


def worker_is_killed(campaign: Campaign) -> float:
    return campaign.in_a_batch("kill")


def kernel_is_out_of_memory(campaign: Campaign) -> float:
    """The worker exceeds the memory of its group, and the kernel ends it."""
    (worker,) = campaign.server.workers
    limit_memory(worker, campaign.undo)
    return campaign.in_a_batch("balloon")


def decoders_are_killed(campaign: Campaign) -> float:
    (worker,) = campaign.server.workers
    _wait(lambda: bool(children(worker)), "there is no decoding process")
    for decoder in children(worker):
        os.kill(decoder, signal.SIGKILL)
    return time.monotonic()


def disk_is_full(campaign: Campaign) -> float:
    """Then the worker dies, and the next one starts on the full disk."""
    if not os.path.ismount(campaign.folder):
        raise NotPossibleHere("needs the right to mount a file system")
    rest = campaign.folder / "rest"
    with rest.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    campaign.undo.callback(rest.unlink)
    return campaign.kill_worker()


def temporary_folder_is_swept(campaign: Campaign) -> float:
    """Then the worker dies, and the next one starts without what was in the folder."""
    for path in campaign.folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return campaign.kill_worker()


def worker_is_stopped(campaign: Campaign) -> float:
    return campaign.in_a_batch("stop")


def interpreter_hangs(campaign: Campaign) -> float:
    """A library holds the GIL, so that no thread of the worker runs."""
    return campaign.in_a_batch("hold")


def worker_is_paused(campaign: Campaign) -> float:
    """Stopped for 3 s, as a debugger or a snapshot of the machine does."""
    (worker,) = campaign.server.workers
    os.kill(worker, signal.SIGSTOP)
    begin_s = time.monotonic()
    time.sleep(3)
    os.kill(worker, signal.SIGCONT)
    return begin_s


@dataclass(frozen=True)
class Fault:
    """`notice`: what the log says; empty if there is nothing to notice. `codes`: errors that callers may get."""

    cause: Callable[[Campaign], float]
    notice: str
    codes: frozenset[str]
    replaces_worker: bool = False

    @property
    def name(self) -> str:
        return self.cause.__name__.replace("_", " ")


_LOST = frozenset({"connection", "deadline_exceeded"})  # the next worker starts with the requests of all callers
_FAILED = _LOST | {"device_failed", "shutting_down", "not_ready"}
_KILLED = r"was killed by signal 9 \(out of memory\?"
FAULTS = (
    Fault(batch_fails, "repeating it in halves", frozenset()),
    Fault(device_out_of_memory, "the device is out of memory", frozenset()),
    Fault(decoders_are_killed, "a decoding process is replaced", frozenset()),
    Fault(worker_is_paused, "", frozenset()),
    Fault(device_error, "the engine stops with", _FAILED, replaces_worker=True),
    Fault(device_hangs, r"did not finish a batch within", _FAILED, replaces_worker=True),
    Fault(worker_is_killed, _KILLED, _LOST, replaces_worker=True),
    Fault(kernel_is_out_of_memory, _KILLED, _LOST, replaces_worker=True),
    Fault(temporary_folder_is_swept, _KILLED, _LOST, replaces_worker=True),
    Fault(disk_is_full, _KILLED, _LOST, replaces_worker=True),
    Fault(worker_is_stopped, "has been stopped", _LOST, replaces_worker=True),
    Fault(interpreter_hangs, "has not run its event loop", _LOST, replaces_worker=True),
)


@dataclass(frozen=True)
class Report:
    """What one fault did. Times are in seconds from the fault; `noticed_s` is None if there was nothing to notice."""

    fault: Fault
    noticed_s: float | None
    answered_s: float
    longest_s: float
    outcomes: dict[str, int]

    def line(self) -> str:
        """The report for people."""
        noticed = "" if self.noticed_s is None else f"{self.noticed_s:.1f} s"
        return (
            f"{self.fault.name:26} noticed {noticed:>7}, answers again {self.answered_s:5.1f} s, "
            f"longest wait {self.longest_s:5.1f} s, {dict(sorted(self.outcomes.items()))}"
        )

    def mistakes(self) -> list[str]:
        """Outcomes that no caller may get after this fault."""
        return sorted(set(self.outcomes) - {"ok"} - self.fault.codes)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Campaign]:
    """A service of the bundled model and its callers, who wait at most its timeout and some seconds."""
    temporary = folder / "temporary"
    temporary.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(temporary)]
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if not os.geteuid() and not subprocess.run(mount, check=False, capture_output=True).returncode:
            stack.callback(subprocess.run, ["umount", "--lazy", str(temporary)], check=True)
        for name, value in {"TMPDIR": temporary, "PYTHONPATH": ROOT, "EMBEDDING_TESTS_FAULT": folder / "fault"}.items():
            patch.setenv(name, str(value))
        server = start_server(
            folder,
            target="tests.faults.faulty_service:Qwen3VLEmbedding",
            device="cpu",
            request_timeout_s=str(REQUEST_TIMEOUT_S),
            stuck_after_s=str(STUCK_AFTER_S),
        )
        try:
            port = int(server.url.rpartition(":")[2])
            yield Campaign(server, temporary, folder / "fault", Callers(port, REQUEST_TIMEOUT_S + SLACK_S))
        finally:
            server.stop()


def run(campaign: Campaign, fault: Fault) -> Report:
    """Cause a fault while the callers wait, and measure. Raises `NotPossibleHere`."""
    log, callers = campaign.server.log, campaign.callers
    with campaign.undo:
        before = len(log.read_text())
        with callers.running():
            _wait(lambda: callers.outcomes()["ok"] > 2 * NUM_CALLERS, "the callers got no answers")
            begin_s = fault.cause(campaign)
            noticed_s = None
            if fault.notice:
                _wait(
                    lambda: re.search(fault.notice, log.read_text()[before:]), f"the log does not say {fault.notice!r}"
                )
                noticed_s = time.monotonic() - begin_s
            since_s = time.monotonic() if fault.replaces_worker else begin_s
            _wait(lambda: _first_ok(callers, since_s) is not None, "no request was answered after the fault")
            answered_s = (_first_ok(callers, since_s) or 0) - begin_s
            time.sleep(1)
        longest_s = max(one.ended_s - one.sent_s for one in callers.answers)
        return Report(fault, noticed_s, answered_s, longest_s, dict(callers.outcomes()))


def _first_ok(callers: Callers, since_s: float) -> float | None:
    """When the first request that was sent after `since_s` and got its vectors got them."""
    return min((one.ended_s for one in callers.answers if one.outcome == "ok" and one.sent_s > since_s), default=None)


def _wait(condition: Callable[[], object], failure: str) -> None:
    end_s = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < end_s, failure
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def limit_memory(pid: int, undo: contextlib.ExitStack) -> None:
    """Move a process to a group of the kernel that may take 256 MB more than the process has now."""
    root = Path("/sys/fs/cgroup")
    parent, name = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    group = parent / f"embedding-tests-{pid}"
    try:
        group.mkdir()
        undo.callback(group.rmdir)
        (group / "cgroup.procs").write_text(str(pid))
        (group / name).write_text(str(2**28))  # pages from before the move do not count
    except OSError as error:
        raise NotPossibleHere(f"needs the right to limit a process's memory: {error}") from error
