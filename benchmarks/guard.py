"""Is this tree slower than an earlier commit? `python -m benchmarks.guard [BASE]` asks services of both, in turns.

BASE is a commit; by default the one that set the version, so the last release. Both services run with the packages of
this environment, or, with `--install`, the base with its own. In each round, every workload is sent to one service and
then to the other, and the order changes from round to round; the service that waits is paused. A change is the median
of the rounds' ratios, with a bootstrap interval of 95%.

Exit status: 1 if a workload takes over 15% longer and the interval excludes 0, 2 if there is no such commit here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import report
from benchmarks.contenders import ROOT, Contender
from benchmarks.load import drive
from benchmarks.protocols import LocalProtocol
from benchmarks.workloads import make_items, read_words

MAX_SLOWDOWN = 0.15
NUM_RESAMPLES = 4000
MAX_S = 120.0  # for a workload in one round
VERSION_FILE, VERSION_LINE = "embedder/__init__.py", "__version__ = "


@dataclass(frozen=True)
class Workload:
    """`num_requests` in each round, of `size` items each, from `num_callers` callers."""

    name: str
    path: str
    items: str
    size: int
    num_callers: int
    num_requests: int


WORKLOADS = (
    Workload("one query", "/txt/embed", "query", 1, 1, 50),
    Workload("8 callers, texts", "/txt/embed", "text-mixed", 1, 8, 200),
    Workload("2 callers, 32 texts each", "/txt/embed", "text-mixed", 32, 2, 6),
    Workload("2 callers, pictures of 448 px", "/img/embed", "image-448", 1, 2, 10),
)


@dataclass(frozen=True)
class Change:
    """The relative change of a time: 0.1 is 10% longer. `low` and `high` are the ends of the interval."""

    median: float
    low: float
    high: float

    @property
    def is_regression(self) -> bool:
        """Whether the time is clearly longer."""
        return self.median > MAX_SLOWDOWN and self.low > 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", metavar="BASE", help="a commit; default: the one that set the version")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--install", action="store_true", help="give the base an environment of its own, with pip")
    chosen = parser.parse_args(arguments)
    base = find_commit(chosen.base)
    if base is None:
        print(f"no commit {chosen.base or 'that sets the version'} here, so nothing is compared", file=sys.stderr)
        return 2
    with worktree(base) as tree, tempfile.TemporaryDirectory() as folder:
        python = install(tree, Path(folder)) if chosen.install else Path(sys.executable)
        changes = compare(tree, ROOT, rounds=chosen.rounds, base_python=python)
    print(f"time against {base[:10]}, medians of {chosen.rounds} rounds\n")
    print(changes_table(changes))
    return int(any(change.is_regression for change in changes.values()))


def find_commit(name: str | None) -> str | None:
    """The hash of a commit, or of the one that set the version. None if the repository has no such commit."""
    command = ["log", "-1", "--format=%H", f"-G{VERSION_LINE}", "--", VERSION_FILE]
    if name is not None:
        command = ["rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    run = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603, S607
    return run.stdout.strip() or None


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The files of a commit, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        tree = Path(folder) / "base"
        git = ["git", "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)  # noqa: S603
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], cwd=ROOT, check=True)  # noqa: S603


def install(tree: Path, folder: Path) -> Path:
    """Install a tree and its packages into a new environment in `folder`; the environment's Python."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-qq", "-e", str(tree)], check=True)  # noqa: S603
    return python


def compare(base: Path, new: Path, *, rounds: int, base_python: Path = Path(sys.executable)) -> dict[str, Change]:
    """The change of each workload's time, from the tree `base` to the tree `new`."""
    servers = [_service("base", base, base_python), _service("new", new, Path(sys.executable))]
    bodies = {workload.name: _bodies(workload) for workload in WORKLOADS}
    times: dict[str, list[tuple[float, float]]] = {workload.name: [] for workload in WORKLOADS}
    try:
        for server in servers:
            server.start(bodies[WORKLOADS[0].name][0])
            server.pause()
        for number in tqdm(range(rounds + 1), desc="rounds", file=sys.stderr):  # the first one warms up
            for workload in WORKLOADS:
                taken = [0.0, 0.0]
                for which in (0, 1) if number % 2 else (1, 0):
                    taken[which] = _seconds_of(servers[which], workload, bodies[workload.name])
                if number:
                    times[workload.name].append((taken[0], taken[1]))
    finally:
        for server in servers:
            server.stop()
    return {name: change_of(pairs) for name, pairs in times.items()}


def change_of(pairs: Sequence[tuple[float, float]]) -> Change:
    """The change from the first to the second of each pair, which were measured in the same round."""
    ratios = np.array([new / base for base, new in pairs]) - 1
    resampled = np.random.default_rng(0).choice(ratios, (NUM_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
    return Change(float(np.median(ratios)), float(low), float(high))


def changes_table(changes: dict[str, Change]) -> str:
    """A Markdown table."""
    rows = [
        (
            name,
            f"{change.median:+.0%}",
            f"{change.low:+.0%} to {change.high:+.0%}",
            "slower" if change.is_regression else "",
        )
        for name, change in changes.items()
    ]
    return report.table(("workload", "time", "95% interval", ""), rows)


def _service(name: str, tree: Path, python: Path) -> Contender:
    """The service of a tree, with the bundled model."""
    command = [str(python), "-m", "bentoml", "serve", ".", "--host", "127.0.0.1", "--port", "PORT"]
    settings = {"PYTHONPATH": str(tree), "EMBEDDER_MODEL": "bundled", "EMBEDDER_DEVICE": "cpu"}
    return Contender(name, command, WORKLOADS[0].path, settings, cwd=tree)


def _bodies(workload: Workload) -> list[bytes]:
    words = read_words(ROOT / "embedder" / "default_model")
    return LocalProtocol().bodies(make_items(workload.items, 64, words), workload.size)


def _seconds_of(server: Contender, workload: Workload, bodies: Sequence[bytes]) -> float:
    url = f"http://127.0.0.1:{server.port}{workload.path}"
    with server.awake():
        load = asyncio.run(
            drive(url, bodies, concurrency=workload.num_callers, seconds=MAX_S, max_requests=workload.num_requests)
        )
    if len(load.latencies_s) < workload.num_requests:
        raise RuntimeError(
            f"{server.name}, {workload.name}: {load.num_refused} refused, {load.num_unfinished} unfinished"
        )
    return load.wall_s


if __name__ == "__main__":
    sys.exit(main())
