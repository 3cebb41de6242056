"""Parts of a benchmark that run in processes of their own and write each result at once.

A part has steps. If its process crashes or reaches its time limit, the results of the finished steps are on disk, and
the steps after the one that failed run in a new process.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GRACE_SECONDS = 120  # for a process to start, to load and to finish its step


class PartFile:
    """One part's results in a JSON file, which is replaced after each change.

    `started`: the steps that were begun. `results`: one entry for each step that ended well. `faults`: one line each.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.json"
        self.data: dict[str, Any] = {"started": [], "results": {}, "faults": []}
        if self.path.is_file():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def update(self, **fields: Any) -> None:
        self.data |= fields
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def fault(self, what: str) -> None:
        self.update(faults=[*self.data["faults"], what])

    def guard(self, what: str, run: Callable[[], Any]) -> Any:
        """The result of `run`, or None after an exception, which is recorded as a fault."""
        try:
            return run()
        except Exception as error:
            traceback.print_exc()
            self.fault(f"{what}: {type(error).__name__}: {str(error)[:500]}")
            return None

    def step(self, name: str, run: Callable[[], Any]) -> None:
        """Run one step under the guard and record its result."""
        self.update(started=[*self.data["started"], name])
        result = self.guard(name, run)
        if result is not None:
            self.update(results={**self.data["results"], name: result})


def read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """The data of every part on disk, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def run_part(
    folder: Path, name: str, steps: Sequence[str], seconds: float, command: Callable[[Sequence[str], float], list[str]]
) -> None:
    """Run the steps in a process, and in another one after a crash, until all were begun or `seconds` are over.

    `command` returns the command line for steps and seconds. Its process writes `PartFile(folder, name)`.
    """
    deadline = time.monotonic() + seconds
    PartFile(folder, name).path.unlink(missing_ok=True)
    left = seconds
    while steps and left > 0:
        reason = _run_process(command(steps, left), left + GRACE_SECONDS)
        if not reason:
            return
        part = PartFile(folder, name)
        begun = [step for step in steps if step in part.data["started"]]
        part.fault(f"{begun[-1] if begun else 'before the first step'}: {reason}")
        steps = [step for step in steps if step not in begun] if begun else []
        left = deadline - time.monotonic()


def _run_process(command: list[str], limit_s: float) -> str:
    """Why the process did not end well; empty if it did. It is killed at the time limit, and with this function."""
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])  # noqa: S603
    try:
        status = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s, the time limit of this part"
    finally:
        process.kill()
        process.wait()
    return f"the process ended with status {status}" if status else ""


def exit_with_parent() -> None:
    """End this process when its parent is gone, also after a SIGKILL of the parent."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
