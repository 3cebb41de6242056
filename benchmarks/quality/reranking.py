"""Reranking tasks of mteb, in the order of an embedder and of a reranker: `python -m benchmarks.quality rerank`.

mteb's reranking tasks bring the candidates of each query. Of other tasks, which are retrieval tasks, the candidates are
the documents that the embedder finds first. Both models order the same candidates. `--tasks` takes names of mteb and of
`tasks.LOCAL_TASKS`. The results of a finished task and all vectors are stored in `--output` and read by the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import orjson
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import report
from benchmarks.quality.mteb_model import EmbedderModel, items_of, preprocessing_of, prompt_of
from benchmarks.quality.suite import add_shared_arguments, find_tasks
from benchmarks.quality.targets import Item, Library, name_of
from benchmarks.quality.vectors import Vectors
from embedder import Embedder, Reranker

EMBEDDER, RERANKER = "embedder", "reranker"
METRICS = {"map": "map_at_1000", "mrr": "mrr_at_1000", "nDCG@10": "ndcg_at_10"}  # as in reports: mteb's names
_PROBE = ("red", ["a red square", "the night", "42"])


class TaskFailed(RuntimeError):
    """The reason why mteb could not run a task."""


class RerankerModel:
    """A reranker for `mteb.evaluate`. Pairs of a query follow each other, and are scored together."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker
        info = reranker.info()
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name_of(info),
                "revision": info["revision"] or None,
                "model_type": ["cross-encoder"],
                "modalities": ["text", "image"],
                "max_tokens": info["limits"]["max_input_tokens"],
                "use_instructions": True,
                "experiment_kwargs": preprocessing_of(info),
            }
        )

    def predict(
        self,
        inputs1: Iterable[dict[str, Any]],
        inputs2: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        **_: Any,
    ) -> NDArray[np.float64]:
        """The score of each pair, (num_pairs,). Both inputs are batches, as those of `EmbedderModel.encode`."""
        instruction = prompt_of(task_metadata, PromptType.query)
        pairs = zip(_items(inputs1), _items(inputs2), strict=True)
        groups = itertools.groupby(pairs, lambda pair: pair[0])
        scores: list[float] = []
        for query, group in tqdm(groups, desc=f"{task_metadata.name} {hf_subset} {hf_split}", unit="query"):
            scores += self.reranker.score(query, [document for _, document in group], instruction=instruction)
        return np.array(scores)


def _items(batches: Iterable[dict[str, Any]]) -> Iterator[Item]:
    return (item for batch in batches for item in items_of(batch))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parse(arguments)
    with Embedder(chosen.model, preprocessing=chosen.preprocessing) as embedder:
        target = Library(embedder)
        with (
            Reranker(chosen.reranker, preprocessing=chosen.preprocessing) as reranker,
            Vectors(target, chosen.output / "vectors") as vectors,
        ):
            models = EmbedderModel(vectors), RerankerModel(reranker)
            folder = chosen.output / _run_name(target.info, reranker, chosen.candidates)
            rows, failures = measure(find_tasks(chosen), models, folder, chosen.candidates, chosen.batch_size)
            infos = {EMBEDDER: target.info, RERANKER: reranker.info()}
    shown = " ".join(
        f"--{option} {'bundled' if infos[role]['is_bundled_model'] else name_of(infos[role])}"
        for option, role in (("model", EMBEDDER), ("reranker", RERANKER))
    )
    data = {
        "environment": report.environment(
            f"python -m benchmarks.quality rerank {shown} --preprocessing {chosen.preprocessing} "
            f"--tasks {' '.join(chosen.tasks)} --candidates {chosen.candidates} --output FOLDER"
        ),
        "models": {role: {"name": name_of(info), **preprocessing_of(info)} for role, info in infos.items()},
        "candidates": chosen.candidates,
        "tasks": rows,
        "not_run": failures,
    }
    text = table(data)
    bars = {f"{row['task']}, {row['order']}": {name: row[name] for name in METRICS} for row in rows}
    report.save(chosen.results, "rerank", data, text, bars, "score, %")
    print(text)
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality rerank", description=__doc__)
    parser.add_argument("--reranker", default="", help="folder or hub id of the reranker; default: the bundled one")
    parser.add_argument("--model", default="", help="folder or hub id of the embedder; default: the bundled model")
    add_shared_arguments(parser, parser)
    parser.set_defaults(benchmark=None)
    parser.add_argument(
        "--candidates", type=int, default=24, help="per query of a task that brings none (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def _run_name(embedder: dict[str, Any], reranker: Reranker, candidates: int) -> str:
    """Name of the folder with the results of these two models. A checkpoint with other weights has another one."""
    probe = [round(score, 4) for score in reranker.score(*_PROBE)]
    about = [[name_of(info), info["revision"], preprocessing_of(info)] for info in (embedder, reranker.info())]
    return hashlib.sha256(orjson.dumps([about, probe, candidates], option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def measure(
    tasks: Sequence[Any], models: tuple[EmbedderModel, RerankerModel], folder: Path, candidates: int, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The metrics of each task in both orders, in percent, and the tasks that failed with their reason."""
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for task in tasks:
        name = task.metadata.name
        try:
            if task.metadata.type != "Reranking":
                found = folder / "candidates"
                _evaluate(models[0], task, found, batch_size, prediction_folder=found / "predictions")
                task = task.convert_to_reranking(found / "predictions", top_k=candidates)
            results = [_evaluate(model, task, folder / "reranked", batch_size) for model in models]
        except TaskFailed as error:
            failures[name] = str(error)
            continue
        for order, result in zip((EMBEDDER, RERANKER), results, strict=True):
            scores = [one for split in result.scores.values() for one in split]
            metrics = {
                name: round(100 * float(np.mean([one[key] for one in scores])), 3)  # stored results have 5 digits
                for name, key in METRICS.items()
            }
            rows.append({"task": name, "order": order, **metrics})
    return rows, failures


def _evaluate(model: Any, task: Any, folder: Path, batch_size: int, prediction_folder: Path | None = None) -> Any:
    """The `TaskResult` of mteb. A result that exists in `folder` is read. Raises `TaskFailed`."""
    results = mteb.evaluate(
        model,
        [task],
        cache=mteb.ResultCache(folder),
        encode_kwargs={"batch_size": batch_size},
        prediction_folder=prediction_folder,
        raise_error=False,
        co2_tracker=False,
    )
    if results.exceptions:
        raise TaskFailed(results.exceptions[0].exception)
    return results.task_results[0]


def table(data: dict[str, Any]) -> str:
    rows = [[row["task"], row["order"], *(f"{row[name]:.2f}" for name in METRICS)] for row in data["tasks"]]
    about = "; ".join(
        f"{role} {one['name']} in {one['dtype']}, images with preprocessing `{one['preprocessing']}` and at most "
        f"{one['max_pixels']:,} pixels"
        for role, one in data["models"].items()
    )
    about += f". Of tasks that bring no candidates, the embedder's first {data['candidates']} are ordered."
    lines = [f"NOT RUN: {task}: {reason}" for task, reason in data["not_run"].items()]
    return "\n\n".join([about, report.table(("task", "order", *(f"{name}, %" for name in METRICS)), rows), *lines])
