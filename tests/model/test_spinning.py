"""When OpenMP's threads may spin while they wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import embedder.model.spinning as spinning_module
from embedder import Embedder, openmp
from embedder.errors import ModelUnavailable
from embedder.model.spinning import CHECK_S, MAX_MEAN_SHARE, MAX_SHARE, Spinning, Surplus, read_waits

QUIET_S = 11 * CHECK_S  # after which threads spin
linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
two_cores = pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two cores")


class Machine:
    """A clock, and the seconds for which threads have waited for a core."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits = {"1": 5.0, "2": 7.0}  # from before the computing began

    def compute(self, spinning: Spinning, seconds: float, waiting: float = 0.0, thread: str = "1") -> None:
        """Compute, while one thread waits for a core for `waiting` seconds per second."""
        end_s = self.now_s + seconds - 1e-6
        while self.now_s < end_s:
            with spinning.computing():
                self.now_s += CHECK_S / 4
                self.waits[thread] = self.waits.get(thread, 0.0) + waiting * CHECK_S / 4
                spinning.check()  # between two layers
                self.now_s += CHECK_S / 4
                self.waits[thread] += waiting * CHECK_S / 4


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def spinning(machine: Machine) -> Iterator[Spinning]:
    spinning = Spinning(lambda: dict(machine.waits), lambda: machine.now_s)
    yield spinning
    spinning.close()


def test_threads_spin_after_a_second_of_computing_without_waiting(machine: Machine, spinning: Spinning) -> None:
    machine.compute(spinning, QUIET_S / 2)
    assert not spinning.is_allowed
    machine.compute(spinning, QUIET_S / 2)
    assert spinning.is_allowed


@pytest.mark.parametrize("thread", ["1", "new"])
def test_threads_stop_spinning_as_soon_as_one_waits_for_a_core(
    thread: str, machine: Machine, spinning: Spinning
) -> None:
    machine.compute(spinning, 2 * QUIET_S)
    assert spinning.is_allowed
    machine.compute(spinning, CHECK_S + 1e-3, 2 * MAX_SHARE, thread)
    assert not spinning.is_allowed
    machine.compute(spinning, 3 * QUIET_S, (MAX_MEAN_SHARE + MAX_SHARE) / 2, thread)
    assert not spinning.is_allowed
    machine.compute(spinning, 2 * QUIET_S)
    assert spinning.is_allowed


def test_short_waits_do_not_matter(machine: Machine, spinning: Spinning) -> None:
    """Other programs, and the other threads of the service, always need a core for some milliseconds."""
    machine.compute(spinning, 2 * QUIET_S, MAX_MEAN_SHARE * 0.9)
    assert spinning.is_allowed


def test_threads_that_spin_may_make_others_wait_longer(machine: Machine, spinning: Spinning) -> None:
    machine.compute(spinning, 2 * QUIET_S)
    machine.compute(spinning, 2 * QUIET_S, (MAX_MEAN_SHARE + MAX_SHARE) / 2)
    assert spinning.is_allowed


def test_a_thread_that_ends_does_not_hide_the_waits_of_the_others(machine: Machine, spinning: Spinning) -> None:
    machine.compute(spinning, 2 * QUIET_S)
    del machine.waits["2"]
    machine.compute(spinning, CHECK_S + 1e-3, 2 * MAX_SHARE)
    assert not spinning.is_allowed


def test_time_between_batches_is_not_quiet_computing(machine: Machine, spinning: Spinning) -> None:
    machine.compute(spinning, QUIET_S / 2)
    machine.now_s += 1000 * QUIET_S
    machine.compute(spinning, QUIET_S / 4)
    assert not spinning.is_allowed


def test_threads_never_spin_where_waits_are_not_known(machine: Machine, spinning: Spinning) -> None:
    machine.waits = {}
    with spinning.computing():
        machine.now_s += 10 * QUIET_S
    assert not spinning.is_allowed


@two_cores
def test_half_of_the_threads_does_not_decide(machine: Machine, spinning: Spinning) -> None:
    """Two halves of a batch are computed by two threads, and neither may change what the other reads."""
    num_threads = torch.get_num_threads()
    machine.compute(spinning, 2 * QUIET_S)
    with spinning.computing():
        torch.set_num_threads(num_threads // 2)
        try:
            machine.now_s += QUIET_S
            machine.waits["1"] += QUIET_S
            spinning.check()
            assert spinning.is_allowed
        finally:
            torch.set_num_threads(num_threads)
    assert not spinning.is_allowed  # decided when the batch is over


@linux
def test_a_thread_waits_while_another_process_has_its_core() -> None:
    core = min(os.sched_getaffinity(0))
    waits: list[float] = []
    program = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as neighbor:

        def compute() -> None:
            os.sched_setaffinity(0, [core])  # of this thread
            me = str(threading.get_native_id())
            before_s = read_waits()[me]
            end_s = time.monotonic() + 1
            while time.monotonic() < end_s:
                pass
            waits.append(read_waits()[me] - before_s)

        try:
            assert neighbor.stdout
            neighbor.stdout.readline()
            thread = threading.Thread(target=compute)
            thread.start()
            thread.join()
        finally:
            neighbor.kill()
    assert 0.2 < waits[0] < 1


def test_kernel_that_measures_nothing_gives_no_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for thread, text in (("1", "0 0 0"), ("2", "0 0 0")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"{text}\n")
    monkeypatch.setattr(spinning_module, "TASKS", tmp_path)
    assert read_waits() == {}
    (tmp_path / "1" / "schedstat").write_text("7000000 2000000000 12\n")
    assert read_waits() == {"1": 2.0}


def test_model_that_cannot_be_loaded_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ModelUnavailable):
        Embedder(str(tmp_path), device="cpu")
    end_s = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@linux
@two_cores
def test_surplus_threads_are_as_many_as_cores_and_end() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    torch.zeros(2**17).add_(1)  # this thread's own team
    before = count()
    surplus = Surplus()
    assert count() == before + openmp.num_cores()
    surplus.end()
    end_s = time.monotonic() + 10
    while count() > before and time.monotonic() < end_s:
        time.sleep(0.01)
    assert count() == before
