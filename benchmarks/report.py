"""Write results to benchmarks/results/: JSON, a Markdown table, a plot, and the environment of the run."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "qwen3-vl-embedding-service",
    "torch",
    "transformers",
    "sentence-transformers",
    "bentoml",
    "flash-attn",
    "vllm",
    "fastapi",
    "litserve",
    "uvicorn",
    "starlette",
    "aiohttp",
    "numpy",
    "pillow",
    "mteb",
    "coloraide",
    "pyarrow",
    "ray",
)


def command(module: str, chosen: argparse.Namespace) -> str:
    """The command that repeats the measurement, without folders, which are specific to a machine."""
    words = ["python", "-m", f"benchmarks.{module}"]
    for name, value in vars(chosen).items():
        if value is not None and not isinstance(value, Path):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def environment(command: str) -> dict[str, Any]:
    """Hardware, versions, command and date, without host names and paths."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name, and its family and model, since virtual machines may show the same name for several."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:  # not x86
        return platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits: 12300, 123, 12.3, 0.123."""
    return f"{float(f'{value:.3g}'):.10g}" if value < 1e6 else f"{value:.3g}"


Bars = dict[str, dict[str, float]]


def save(folder: Path, name: str, data: dict[str, Any], text: str, bars: Bars, axis: str) -> None:
    """Write `NAME.json`, `NAME.md` and `NAME.png`. `bars`: the values by name for each row of the plot.

    Without bars there is no plot.
    """
    write(folder, name, data, text)
    if bars:
        _plot(folder / f"{name}.png", bars, axis)


def write(folder: Path, name: str, data: dict[str, Any], text: str) -> None:
    """Write `NAME.json` and `NAME.md`, for results with another plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    about = data["environment"]
    hardware = about["gpu"] or f"{about['cpu']}, {about['cores']} cores"
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    head = f"`{about['command']}`, {about['date']}, {hardware}, Python {about['python']}, {versions}."
    (folder / f"{name}.md").write_text(f"{head}\n\n{text}\n", encoding="utf-8")


def _plot(path: Path, bars: Bars, axis: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for values in bars.values() for name in values))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(bars) * len(names)), layout="constrained")
    height = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        places = [row + (index - (len(names) - 1) / 2) * height for row in range(len(bars))]
        values = [row.get(name, 0.0) for row in bars.values()]
        axes.bar_label(axes.barh(places, values, height, label=name), [number(value) for value in values], fontsize=7)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    shown = [value for row in bars.values() for value in row.values() if value]
    if shown and max(shown) > 100 * min(shown):
        axes.set_xscale("log")
    figure.legend(fontsize=8, loc="outside upper center", ncols=6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
