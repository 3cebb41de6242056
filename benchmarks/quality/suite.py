"""Run mteb tasks with the service or the library, next to published scores: `python -m benchmarks.quality mteb`.

`--tasks` takes names of mteb and of `tasks.LOCAL_TASKS`; `--benchmark` takes a benchmark of mteb. Result files and all
vectors are stored in `--output`, so that the same command resumes an interrupted run. mteb's tasks download their data
from the hub. Tasks that fail are listed as not run, and the command exits with 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import mteb

from benchmarks import report
from benchmarks.quality.mteb_model import EmbedderModel, preprocessing_of
from benchmarks.quality.published import published_of
from benchmarks.quality.targets import Library, Service, Target, name_of
from benchmarks.quality.tasks import LOCAL_TASKS
from benchmarks.quality.vectors import Vectors
from embedder import Embedder
from embedder.inputs.regimes import RegimeName

RESULTS = report.RESULTS / "quality"
LIBRARY, SERVICE = "library", "service"


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parse(arguments)
    what = f'--benchmark "{chosen.benchmark}"' if chosen.benchmark else f"--tasks {' '.join(chosen.tasks)}"
    about = report.environment(f"python -m benchmarks.quality mteb{shown_target(chosen)} {what} --output FOLDER")
    with target_of(chosen.url, chosen.model, chosen.preprocessing) as target, Vectors(target, chosen.output) as vectors:
        tasks = find_tasks(chosen)
        results = evaluate(EmbedderModel(vectors), tasks, chosen.output, chosen.batch_size)
        info = target.info
    metrics = {task.metadata.name: task.metadata.main_score for task in tasks}
    rows = [
        {"task": one.task_name, "metric": metrics[one.task_name], "score": 100 * one.get_score()}
        for one in results.task_results
    ]
    failures = {failure.task_name: failure.exception for failure in results.exceptions or []}
    figures = compare(name_of(info), rows, complete=chosen.benchmark if not failures else None)
    data = {
        "environment": about,
        "model": name_of(info),
        "through": SERVICE if chosen.url else LIBRARY,
        **preprocessing_of(info),
        "tasks": rows,
        "published": figures,
        "not_run": failures,
    }
    text = table(data)
    bars = {row["task"]: {row["metric"]: row["score"]} for row in rows}
    report.save(chosen.results, "mteb", data, text, bars, "score, %")
    print(text)
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality mteb", description=__doc__)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--url", help="a running service of this project")
    target.add_argument("--model", default="", help="folder or hub id for the library; default: the bundled model")
    what = parser.add_mutually_exclusive_group()
    add_shared_arguments(parser, what)
    what.add_argument("--benchmark", help='a benchmark of mteb, such as "MTEB(Multilingual, v2)"')
    return parser.parse_args(arguments)


def add_shared_arguments(parser: argparse.ArgumentParser, what: Any) -> None:
    """The arguments of each command over mteb's tasks. `what`: the parser, or its group for the choice of tasks."""
    what.add_argument("--tasks", nargs="+", default=list(LOCAL_TASKS), help="default: the tasks that need no hub")
    parser.add_argument(
        "--preprocessing",
        choices=get_args(RegimeName),
        default="checkpoint",
        help="of the library, as EMBEDDER_PREPROCESSING; published scores were made with `reference`",
    )
    parser.add_argument("--count", type=int, help="entries of each local task; default: all")
    parser.add_argument("--batch-size", type=int, default=32, help="items per call of the embedder")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for result files and vectors of one embedder"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)


def shown_target(chosen: argparse.Namespace) -> str:
    """The target's arguments for a report, without URLs and paths of the machine."""
    if chosen.url:
        return " --url URL"
    model = f" --model {name_of({'model': chosen.model})}" if chosen.model else ""
    return f"{model} --preprocessing {chosen.preprocessing}"


@contextmanager
def target_of(url: str | None, model: str, preprocessing: RegimeName) -> Iterator[Target]:
    """The service at `url`, or the library with `model`, which preprocesses images as `preprocessing` says."""
    if url:
        with Service(url) as service:
            yield service
        return
    with Embedder(model, preprocessing=preprocessing) as embedder:
        yield Library(embedder)


def find_tasks(chosen: argparse.Namespace) -> list[mteb.AbsTask]:
    """The tasks by name, local ones first. Raises `KeyError` for an unknown name."""
    if chosen.benchmark:
        return list(mteb.get_benchmark(chosen.benchmark).tasks)
    ours = [LOCAL_TASKS[name](chosen.count) for name in chosen.tasks if name in LOCAL_TASKS]
    return ours + [mteb.get_task(name) for name in chosen.tasks if name not in LOCAL_TASKS]


def evaluate(model: EmbedderModel, tasks: Sequence[mteb.AbsTask], folder: Path, batch_size: int) -> Any:
    """Run the tasks and return mteb's `ModelResult`. Results that exist in `folder` are read."""
    return mteb.evaluate(
        model,
        tasks,
        cache=mteb.ResultCache(folder),
        encode_kwargs={"batch_size": batch_size},
        raise_error=False,
        co2_tracker=False,
    )


def compare(name: str, rows: Sequence[dict[str, Any]], complete: str | None) -> list[dict[str, Any]]:
    """The published scores of the model, and ours for the benchmark `complete`, of which all tasks were run."""
    mean = sum(row["score"] for row in rows) / max(len(rows), 1)
    return [
        {"figure": figure, "published": value, "ours": mean if figure == complete else None}
        for figure, value in published_of(name).items()
    ]


def table(data: dict[str, Any]) -> str:
    rows: list[list[object]] = [[row["task"], row["metric"], f"{row['score']:.2f}"] for row in data["tasks"]]
    if len(rows) > 1:
        rows.append([f"mean of {len(rows)}", "", f"{sum(row['score'] for row in data['tasks']) / len(rows):.2f}"])
    about = f"{data['model']}, through the {data['through']}, in {data['dtype']}. Images: preprocessing "
    about += f"`{data['preprocessing']}`, at most {data['max_pixels']:,} pixels."
    parts = [about, report.table(("task", "score", "%"), rows)]
    if data["published"]:
        lines = [[row["figure"], row["published"], *_difference(row)] for row in data["published"]]
        parts.append(report.table(("published", "theirs, %", "ours, %", "difference"), lines))
    else:
        parts.append("There are no published scores of this model.")
    parts += [f"NOT RUN: {task}: {reason}" for task, reason in data["not_run"].items()]
    return "\n\n".join(parts)


def _difference(row: dict[str, Any]) -> tuple[str, str]:
    if row["ours"] is None:
        return "not run", ""
    return f"{row['ours']:.1f}", f"{row['ours'] - row['published']:+.1f}"
